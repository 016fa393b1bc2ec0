"""What goes into the network and what comes out: one shape each, whatever the network has.

B batch, T tokens, D model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.state.cache import Cache, make_cache
from stellarbyte_jax.model.state.layer_cache import LayerCache
from stellarbyte_jax.model.state.memory import LayerMemory, Memory
from stellarbyte_jax.model.state.router import RouterState


@struct.dataclass
class Inputs:
    """Tokens of a call.

    Attributes:
      tokens_BT: int32 [B, T].
      positions_BT: int32 [B, T], where they do not simply count from 0 (or go on from the cache or the memory). With a
        memory a row goes on with its document where its first position is not 0.
      segment_ids_BT: int32 [B, T], where several documents share a row; no token sees another document. 0 is padding.
      rows_1T: int32 [1, T], index of each token in its row, where tokens are dealt out to the devices of a mesh by
        position (``sharding.ring.dealt_order``); None where they are in order.
      lengths_B: int32 [B], with a cache: how many of the T tokens of each row count, the rest is padding on the right.
        All of them where it is not given.
      max_segments: static; upper bound on the documents of a row, which lets packed rows use the cuDNN kernel.
    """

    tokens_BT: Array
    positions_BT: Array | None = None
    segment_ids_BT: Array | None = None
    lengths_B: Array | None = None
    rows_1T: Array | None = None
    max_segments: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class State:
    """What a call reads from the one before and leaves for the next.

    Attributes:
      cache: keys and values of earlier tokens, for generation. New tokens follow each row's earlier ones.
      memory: states of earlier segments. With an empty cache too, the cache begins with the memory's content, and the
        result has the cache alone.
      router: what routers carry: in generation for the rows of the cache, in training for a step.
    """

    cache: Cache | None = None
    memory: Memory | None = None
    router: RouterState | None = None

    @classmethod
    def initial(cls, config: ByteConfig, rows: int) -> "State":
        """What is carried from batch to batch, before the first one."""
        return cls(memory=Memory.create(config, rows) if config.has_memory else None)

    @classmethod
    def empty(cls, config: ByteConfig, rows: int, max_length: int, memory: Memory | None = None) -> "State":
        """What generation begins with: a cache of ``max_length`` tokens a row, and what else the network reads."""
        return cls(make_cache(config, rows, max_length), memory, RouterState.initial(config, rows))

    def select(self, rows: Array | Sequence[int]) -> "State":
        """The state of these rows of a cache, in this order: fewer, others, or some several times.

        Raises:
          ValueError: there is no such row.
        """
        assert self.cache is not None and self.memory is None
        return State(self.cache.select(rows), None, None if self.router is None else self.router.select(rows))

    def parts(self) -> dict[str, Cache | Memory | RouterState]:
        """What the state holds, by the names of its fields."""
        return {field.name: part for field in fields(self) if (part := getattr(self, field.name)) is not None}

    def split(self, parts: int) -> "State":
        """The rows of a state between batches dealt out to equal parts, on a new first axis."""
        assert self.cache is None and self.router is None
        return State(memory=None if self.memory is None else self.memory.split(parts))

    def by_axes(self, of: Callable[[tuple[str | None, ...], Array], Array]) -> "State":
        """Of a state between calls: what ``of`` makes of the logical axes of each array, and the array."""
        return State(
            None if self.cache is None else self.cache.by_axes(of),
            None if self.memory is None else self.memory.by_axes(of),
            None if self.router is None else self.router.by_axes(of),
        )

    def joined(self) -> "State":
        """Undoes :meth:`split`."""
        return State(memory=None if self.memory is None else self.memory.joined())


class LayerState(NamedTuple):
    """What one layer has of a :class:`State`.

    Attributes:
      cache: keys and values of earlier tokens; updated.
      memory: states of earlier tokens; read.
      router: of this layer, without its first axis; updated.
    """

    cache: LayerCache | None = None
    memory: LayerMemory | None = None
    router: RouterState | None = None


@struct.dataclass
class Mean:
    """A mean that is not divided yet.

    Attributes:
      total: sum of the values, float32 of any shape.
      count: number of them, float32 scalar.
    """

    total: Array
    count: Array

    def __add__(self, other: "Mean") -> "Mean":
        """The mean over the values of both."""
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array:
        """The mean."""
        return self.total / self.count


@struct.dataclass
class Aux:
    """What layers tell besides their activations, each under a name: means over the layers that tell it.

    Attributes:
      losses: terms that training may add to the loss, scalars without their weights.
      statistics: numbers to report, scalars or vectors (of experts, say).
    """

    losses: dict[str, Mean] = struct.field(default_factory=dict)
    statistics: dict[str, Mean] = struct.field(default_factory=dict)

    @classmethod
    def of(cls, losses: Mapping[str, Array] | None = None, statistics: Mapping[str, Array] | None = None) -> "Aux":
        """What one layer tells."""
        one = jnp.ones((), jnp.float32)
        return cls(*({name: Mean(x, one) for name, x in (given or {}).items()} for given in (losses, statistics)))

    def __add__(self, other: "Aux") -> "Aux":
        """Over the layers, or the parts of a batch, of both."""
        return Aux(_sums(self.losses, other.losses), _sums(self.statistics, other.statistics))

    def over_first_axis(self) -> "Aux":
        """Of what the repeats of a scan told, the whole."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), self)

    def values(self) -> dict[str, Array]:
        """All means by their names.

        Raises:
          ValueError: a loss and a statistic have the same name.
        """
        twice = self.losses.keys() & self.statistics.keys()
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))}: the name of a loss and of a statistic")
        return {name: mean.value for name, mean in {**self.losses, **self.statistics}.items()}


def sum_of(parts: Iterable[Aux]) -> Aux:
    """Over all layers, or parts of a batch."""
    return sum(parts, Aux())


def _sums(a: dict[str, Mean], b: dict[str, Mean]) -> dict[str, Mean]:
    return {name: a[name] + b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}


@struct.dataclass
class Output:
    """Result of a call.

    Attributes:
      hidden_BTD: normalised states of the last layer, in the compute dtype; ``ByteTransformer.logits`` takes them.
      state: for the next call.
      aux: named losses and statistics of the layers.
    """

    hidden_BTD: Array
    state: State
    aux: Aux

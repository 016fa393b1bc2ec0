"""What goes into the network and what comes out: one shape each, whatever the network has.

B batch, T tokens, D model.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from stellarbyte_jax.model.state.cache import Cache
from stellarbyte_jax.model.state.memory import Memory


@struct.dataclass
class Inputs:
    """Tokens of a call.

    Attributes:
      tokens_BT: int32 [B, T].
      positions_BT: int32 [B, T], where they do not simply count from 0 (or go on from the cache or the memory). With a
        memory a row goes on with its document where its first position is not 0.
      segment_ids_BT: int32 [B, T], where several documents share a row; no token sees another document. 0 is padding.
      lengths_B: int32 [B], with a cache: how many of the T tokens of each row count, the rest is padding on the right.
        All of them where it is not given.
      max_segments: static; upper bound on the documents of a row, which lets packed rows use the cuDNN kernel.
    """

    tokens_BT: Array
    positions_BT: Array | None = None
    segment_ids_BT: Array | None = None
    lengths_B: Array | None = None
    max_segments: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class State:
    """What a call reads from the one before and leaves for the next.

    Attributes:
      cache: keys and values of earlier tokens, for generation. New tokens follow each row's earlier ones.
      memory: states of earlier segments. With an empty cache too, the cache begins with the memory's content, and the
        result has the cache alone.
    """

    cache: Cache | None = None
    memory: Memory | None = None

    def split(self, parts: int) -> "State":
        """The rows of a state between batches cut into equal parts, on a new first axis."""
        assert self.cache is None
        return State(memory=None if self.memory is None else self.memory.split(parts))

    def joined(self) -> "State":
        """Undoes :meth:`split`."""
        return State(memory=None if self.memory is None else self.memory.joined())


@struct.dataclass
class Aux:
    """What layers tell besides their activations, each under a name.

    Attributes:
      losses: terms that training may add to the loss, float32 scalars without their weights.
      statistics: numbers to report, float32.
    """

    losses: dict[str, Array] = struct.field(default_factory=dict)
    statistics: dict[str, Array] = struct.field(default_factory=dict)

    def __add__(self, other: "Aux") -> "Aux":
        """The sums of equal names, and the names that one of them has."""
        return Aux(_sums(self.losses, other.losses), _sums(self.statistics, other.statistics))

    def mean_over_layers(self, layers: int) -> Self:
        """Each number as the sum of a stack's layers divided by the number of all layers."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0) / layers, self)


def _sums(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
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

"""The key/value cache of a whole model: a pytree that goes in as an argument and comes back as a result.

B batch, T new tokens.
"""

from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from stellarbyte_jax.config import ByteConfig, LayerSpec
from stellarbyte_jax.model.state.full import FullCache
from stellarbyte_jax.model.state.layer_cache import LayerCache, NewTokens
from stellarbyte_jax.model.state.memory import Memory, checked_rows, with_memory_prefix
from stellarbyte_jax.model.state.pruned import PrunedCache
from stellarbyte_jax.model.state.ring import RingCache
from stellarbyte_jax.model.state.storage import ByAxes, Storage
from stellarbyte_jax.sharding import constrain


@struct.dataclass
class Cache:
    """The caches of every layer, and how long each row is.

    Attributes:
      groups: for each layer group the caches of the places of its period, each with the layers of that place stacked.
      lengths_B: position of each row's next token, int32 [B].
      fresh: static; True until the first call, where the tokens of that attend to each other alone.
    """

    groups: tuple[tuple[LayerCache, ...], ...]
    lengths_B: Array
    fresh: bool = struct.field(pytree_node=False, default=True)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.lengths_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        storages = [x for x in jax.tree.leaves(self.groups, is_leaf=_is_storage) if _is_storage(x)]
        return sum(x.nbytes for x in jax.tree.leaves(storages))

    def begin(self, valid_mask_BT: Bool[Array, "B T"], memory: Memory | None) -> tuple[Self, Int[Array, "B T"]]:
        """The cache at the beginning of a call, and the position of each new token.

        With a memory, which only an empty cache may have before it, the tokens come behind its slots.

        Raises:
          ValueError: a layer has no room for the tokens.
        """
        offsets_1T = jnp.arange(valid_mask_BT.shape[1], dtype=jnp.int32)[None, :]
        first = 0 if memory is None else max(memory.slots)
        # Said of the rows, or a mesh would split them further and gather sines of positions in prefill.
        positions_BT = constrain(self.lengths_B[:, None] + first + offsets_1T, ("batch", None))
        groups = []
        for number, places in enumerate(self.groups):
            begun = []
            for place, cache in enumerate(places):
                M, valid_BS = 0, valid_mask_BT
                if memory is not None:
                    valid_BM = memory.groups[number][place].valid_BM
                    M, valid_BS = valid_BM.shape[1], jnp.concatenate([valid_BM, valid_mask_BT], axis=1)
                begun.append(cache.begin(NewTokens(with_memory_prefix(positions_BT, M), valid_BS, M)))
            groups.append(tuple(begun))
        return self.replace(groups=tuple(groups)), positions_BT  # type: ignore[attr-defined]

    def end(
        self, groups: tuple[tuple[LayerCache, ...], ...], positions_BT: Array, valid_mask_BT: Bool[Array, "B T"]
    ) -> Self:
        """The cache after a call, from the layers' caches."""
        groups = tuple(tuple(cache.end() for cache in places) for places in groups)
        lengths_B = positions_BT[:, 0] + jnp.sum(valid_mask_BT, axis=1, dtype=jnp.int32)
        return self.replace(groups=groups, lengths_B=lengths_B, fresh=False)  # type: ignore[attr-defined]

    def select(self, rows: Array | Sequence[int]) -> Self:
        """The cache of these rows, in this order: a smaller batch, another order, or rows several times.

        Raises:
          ValueError: there is no such row.
        """
        rows_B = checked_rows(rows, self.batch_size)
        return self._each(lambda cache: cache.select(rows_B), self.lengths_B[rows_B])

    def reset(self, rows_B: Bool[Array, " B"] | None = None) -> Self:
        """The cache with these rows (all of them where not given) empty."""
        emptied_B = jnp.ones(self.batch_size, bool) if rows_B is None else rows_B
        return self._each(lambda cache: cache.reset(emptied_B), jnp.where(emptied_B, 0, self.lengths_B))

    def grow(self, batch_size: int) -> Self:
        """The cache with empty rows behind the others.

        Raises:
          ValueError: there are more rows already; use :meth:`select`.
        """
        have = self.batch_size
        if batch_size < have:
            raise ValueError(f"the cache has {have} rows: name those of {batch_size} to keep with select()")
        rows = [*range(have), *[0] * (batch_size - have)]
        return self.select(rows).reset(jnp.arange(batch_size) >= have)

    def by_axes(self, of: ByAxes) -> Self:
        """The cache between calls of what ``of`` makes of the logical axes of each array, and the array."""
        return self._each(lambda cache: cache.by_axes(of), of(("batch",), self.lengths_B))

    def _each(self, change: Callable[[LayerCache], LayerCache], lengths_B: Array) -> Self:
        groups = tuple(tuple(change(cache) for cache in places) for places in self.groups)
        return self.replace(groups=groups, lengths_B=lengths_B)  # type: ignore[attr-defined]


def _is_storage(x: object) -> bool:
    return isinstance(x, Storage)


def make_cache(config: ByteConfig, batch_size: int, max_length: int) -> Cache:
    """An empty cache for ``max_length`` tokens a row, of the kinds that ``config`` asks for.

    Windowed layers have a ring, the others room for every token; with ``config.cache.recent`` all are pruned.
    """
    groups = tuple(
        tuple(
            _layer_cache(config, spec, layers, batch_size, max_length)
            for spec, layers in zip(group.period, group.layers_of_places, strict=True)
        )
        for group in config.layer_groups
    )
    # A pruned cache needs the weights of every token, so even the first ones are read through it.
    return Cache(groups, jnp.zeros(batch_size, jnp.int32), fresh=config.cache.recent is None)


def _layer_cache(config: ByteConfig, spec: LayerSpec, layers: int, batch_size: int, max_length: int) -> LayerCache:
    dtype = config.compute_dtype if config.cache.dtype == "compute" else config.cache.dtype
    current = jnp.zeros((), jnp.int32)

    def storage(slots: int) -> Storage:
        return Storage.empty((layers, batch_size, slots, config.kv_heads, config.head_size), dtype)

    if config.cache.recent is not None and config.cache.heavy_hitters is not None:
        held = storage(config.cache.recent + config.cache.heavy_hitters)
        shape = held.keys.shape[:-1]
        return PrunedCache(
            held,
            jnp.full(shape, -1, jnp.int32),
            jnp.zeros(shape),
            current,
            recent=config.cache.recent,
            window=spec.window,
            sink_tokens=config.sink_tokens if spec.window is not None else 0,
        )
    S = max_length + config.memory_slots
    if spec.window is None:
        return FullCache(storage(S), jnp.full((batch_size, S), -1, jnp.int32), current)
    S = config.sink_tokens + spec.compressed + min(spec.window, S)
    return RingCache(
        storage(S),
        jnp.full((batch_size, S), -1, jnp.int32),
        current,
        sink_tokens=config.sink_tokens,
        compressed=spec.compressed,
    )

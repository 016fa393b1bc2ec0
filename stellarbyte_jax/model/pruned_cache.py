"""A cache of bounded size that forgets tokens which got little attention.

R layers, B batch, T new tokens, S slots, K key/value heads, H head size, G query heads of a key/value head.
"""

from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from stellarbyte_jax.config import ByteConfig, LayerKind
from stellarbyte_jax.model.cache import (
    CacheRows,
    Plan,
    Slots,
    decode,
    empty_slots,
    encode,
    layer_slots,
    pattern,
    storage_dtype,
)


@struct.dataclass
class PrunedCache(CacheRows):
    """For each head of each layer the newest keys, and those older ones that got most attention.

    The score of a key is the sum of the attention weights that it got from all tokens since it was written. When a head
    has more keys than slots, the newest ``recent`` stay and of the others those with the largest scores.
    Zhang et al. 2023 (H2O), https://arxiv.org/abs/2306.14048.

    Attributes:
      slots: for each kind of the layer pattern what its layers hold.
      positions: for each kind the position of the token in each slot, int32 [R, B, S, K]; -1 for none.
      scores: for each kind the attention that each slot got, float32 [R, B, S, K].
      lengths: position of each row's next token, int32 [B].
      kinds: static; the layer pattern.
      recent: static; newest tokens, which always stay.
      fresh: static; False, as pruning needs the weights of every token.
    """

    slots: tuple[Slots, ...]
    positions: tuple[jax.Array, ...]
    scores: tuple[jax.Array, ...]
    lengths: jax.Array
    kinds: tuple[LayerKind, ...] = struct.field(pytree_node=False)
    recent: int = struct.field(pytree_node=False)
    fresh: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, config: ByteConfig, batch_size: int) -> Self:
        """An empty cache with ``config.cache``'s number of slots."""
        assert config.cache.recent is not None and config.cache.heavy_hitters is not None
        kinds = pattern(config)
        S = config.cache.recent + config.cache.heavy_hitters
        shape = (config.num_hidden_layers // len(kinds), batch_size, S, config.kv_heads, config.head_size)
        return cls(
            tuple(empty_slots(shape, storage_dtype(config)) for _ in kinds),
            tuple(jnp.full(shape[:-1], -1, jnp.int32) for _ in kinds),
            tuple(jnp.zeros(shape[:-1]) for _ in kinds),
            jnp.zeros(batch_size, jnp.int32),
            kinds,
            config.cache.recent,
        )

    def plan(self, positions_BT: jax.Array, real_BT: jax.Array) -> tuple[Plan, ...]:
        """Positions of the new tokens, -1 for those that are not real; slots are found layer by layer."""
        new_BT = jnp.where(real_BT, positions_BT, -1)
        return tuple(Plan(new_BT, new_BT) for _ in self.kinds)

    def extend(
        self, kind: int, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, plan: Plan
    ) -> tuple["_Extended", jax.Array, jax.Array, jax.Array]:
        """What new tokens attend to: keys, values [B, S + T, K, H] and positions [B, S + T, K], to be settled."""
        old = layer_slots(self.slots[kind], layer)
        new = encode(k_BTKH, v_BTKH, old["keys"].dtype)
        joined = {name: jnp.concatenate([old[name], new[name]], axis=1) for name in old}
        new_BTK = jnp.broadcast_to(plan.positions_BS[:, :, None], k_BTKH.shape[:3])
        old_BSK = jax.lax.dynamic_index_in_dim(self.positions[kind], layer, keepdims=False)
        positions_BSK = jnp.concatenate([old_BSK, new_BTK], axis=1)
        keys_BSKH, values_BSKH = decode(joined, k_BTKH.dtype)
        return _Extended(self, joined, positions_BSK), keys_BSKH, values_BSKH, positions_BSK

    def finish(self, plans: Sequence[Plan], lengths_B: jax.Array) -> Self:
        """The cache after each row took ``lengths_B`` more tokens."""
        del plans
        return self.replace(lengths=self.lengths + lengths_B)  # type: ignore[attr-defined]

    def select(self, rows: jax.Array | Sequence[int]) -> Self:
        """The cache of these rows, in this order."""
        rows_B = jnp.asarray(rows, jnp.int32)
        slots, positions, scores = jax.tree.map(
            lambda x: jnp.take(x, rows_B, axis=1), (self.slots, self.positions, self.scores)
        )
        return self.replace(slots=slots, positions=positions, scores=scores, lengths=self.lengths[rows_B])  # type: ignore[attr-defined]

    def reset(self, rows_B: jax.Array | None = None) -> Self:
        """The cache with these rows (bool [B]; all of them where not given) empty."""
        if rows_B is None:
            rows_B = jnp.ones(self.batch_size, bool)
        positions = tuple(jnp.where(rows_B[None, :, None, None], -1, p) for p in self.positions)
        return self.replace(positions=positions, lengths=jnp.where(rows_B, 0, self.lengths))  # type: ignore[attr-defined]


class _Extended:
    """A pruned cache with the keys of one layer's new tokens, before it is decided which stay."""

    def __init__(self, cache: PrunedCache, joined: Slots, positions_BSK: jax.Array) -> None:
        self._cache, self._joined, self._positions_BSK = cache, joined, positions_BSK

    def settle(self, kind: int, layer: jax.Array, weights_BKGTS: jax.Array) -> PrunedCache:
        """Adds the weights to the scores of their keys, and keeps as many keys as there are slots."""
        cache, positions_BSK = self._cache, self._positions_BSK
        old_BSK = jax.lax.dynamic_index_in_dim(cache.scores[kind], layer, keepdims=False)
        S = old_BSK.shape[1]
        # Padding at the end of a row asks too; its weights count for nothing.
        real_BT = positions_BSK[:, S:, 0] >= 0
        got_BKS = jnp.sum(jnp.where(real_BT[:, None, None, :, None], weights_BKGTS, 0.0), axis=(2, 3))
        scores_BSK = jnp.swapaxes(got_BKS, 1, 2)
        scores_BSK = scores_BSK.at[:, :S].add(old_BSK)
        newest_B11 = jnp.max(positions_BSK, axis=(1, 2), keepdims=True)
        rank_BSK = jnp.where(positions_BSK > newest_B11 - cache.recent, jnp.inf, scores_BSK)
        rank_BSK = jnp.where(positions_BSK < 0, -1.0, rank_BSK)
        _, order_BKS = jax.lax.top_k(jnp.swapaxes(rank_BSK, 1, 2), S)
        order_BSK = jnp.swapaxes(order_BKS, 1, 2)

        def keep(x: jax.Array) -> jax.Array:
            index = order_BSK if x.ndim == 3 else order_BSK[..., None]
            return jnp.take_along_axis(x, index, axis=1)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(old, new, layer, axis=0)

        def replaced(parts: tuple, new) -> tuple:
            return tuple(new if i == kind else part for i, part in enumerate(parts))

        slots = {name: put(x, keep(self._joined[name])) for name, x in cache.slots[kind].items()}
        return cache.replace(  # type: ignore[attr-defined]
            slots=replaced(cache.slots, slots),
            positions=replaced(cache.positions, put(cache.positions[kind], keep(positions_BSK))),
            scores=replaced(cache.scores, put(cache.scores[kind], keep(scores_BSK))),
        )

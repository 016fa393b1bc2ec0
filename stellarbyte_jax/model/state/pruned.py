"""A cache of bounded size that evicts tokens which got little attention.

R layers of a stack, B batch, T new tokens, S slots, K key/value heads, H head size, G query heads of a key/value head.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from stellarbyte_jax.model.state.layer_cache import CachedKV, NewTokens
from stellarbyte_jax.model.state.storage import ByAxes, Storage
from stellarbyte_jax.ops.attention import always_visible
from stellarbyte_jax.sharding.largest import top_k


class _Candidates(NamedTuple):
    """Slots of the current layer and behind them its new tokens, before it is decided which stay."""

    storage: Storage
    positions_BSK: Array


@struct.dataclass
class PrunedCache:
    """For each head of each layer the newest keys, and those older ones that got most attention.

    The score of a key is the sum of the attention weights that it got from all tokens since it was written. When a head
    has more keys than slots, the newest ``recent`` stay and of the others those with the largest scores; keys that a
    window hides from all later tokens leave first.
    Zhang et al. 2023 (H2O), https://arxiv.org/abs/2306.14048.

    Attributes:
      storage: keys and values of the stack.
      positions_RBSK: position of the token in each slot, int32 [R, B, S, K]; -1 for none.
      scores_RBSK: attention that each slot got, float32 [R, B, S, K].
      layer: the current layer, int32.
      new: the tokens of the call; None between calls.
      candidates: of the current layer, between :meth:`append` and :meth:`accumulate`; else None.
      recent: static; newest tokens, which always stay.
      window: static; number of keys that a token of the layer sees; None for all.
      sink_tokens: static; first tokens of a text, which a window does not hide while they stay.
    """

    storage: Storage
    positions_RBSK: Array
    scores_RBSK: Array
    layer: Array
    new: NewTokens | None = None
    candidates: _Candidates | None = None
    recent: int = struct.field(pytree_node=False, default=1)
    window: int | None = struct.field(pytree_node=False, default=None)
    sink_tokens: int = struct.field(pytree_node=False, default=0)

    @property
    def needs_weights(self) -> bool:
        """True: they are the scores."""
        return True

    def begin(self, new: NewTokens) -> Self:
        """Notes the tokens; their slots are found layer by layer."""
        return self.replace(new=new)  # type: ignore[attr-defined]

    def at(self, layer: Int[Array, ""]) -> Self:
        """The cache with another current layer."""
        return self.replace(layer=layer)  # type: ignore[attr-defined]

    def append(self, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]) -> tuple[Self, CachedKV]:
        """The slots and the new tokens, still all of them; :meth:`accumulate` decides which stay."""
        assert self.new is not None
        old, new = self.storage.layer(self.layer), self.storage.encode(k_BSKH, v_BSKH)
        joined = old.joined(new)
        new_BT = jnp.where(self.new.valid_BS, self.new.positions_BS, -1)
        new_BTK = jnp.broadcast_to(new_BT[:, :, None], k_BSKH.shape[:3])
        old_BSK = jax.lax.dynamic_index_in_dim(self.positions_RBSK, self.layer, keepdims=False)
        positions_BSK = jnp.concatenate([old_BSK, new_BTK], axis=1)
        keys_BSKH, values_BSKH = joined.decode(k_BSKH.dtype)
        visible_BSK = always_visible(positions_BSK, sink_tokens=self.sink_tokens)
        candidates = _Candidates(joined, positions_BSK)
        return (
            self.replace(candidates=candidates),  # type: ignore[attr-defined]
            CachedKV(keys_BSKH, values_BSKH, positions_BSK, visible_BSK),
        )

    def accumulate(self, weights_BKGTS: Float[Array, "B K G T S"] | None) -> Self:
        """Adds the weights to the scores of their keys, and keeps as many keys as there are slots."""
        assert self.candidates is not None and self.new is not None and weights_BKGTS is not None
        positions_BSK = self.candidates.positions_BSK
        old_BSK = jax.lax.dynamic_index_in_dim(self.scores_RBSK, self.layer, keepdims=False)
        S = old_BSK.shape[1]
        # Padding has queries too; their weights do not count.
        valid_B11T1 = self.new.valid_BS[:, None, None, :, None]
        got_BKS = jnp.sum(jnp.where(valid_B11T1, weights_BKGTS, 0.0), axis=(2, 3))
        scores_BSK = jnp.swapaxes(got_BKS, 1, 2).at[:, :S].add(old_BSK)
        newest_B11 = jnp.max(positions_BSK, axis=(1, 2), keepdims=True)
        rank_BSK = jnp.where(positions_BSK > newest_B11 - self.recent, jnp.inf, scores_BSK)
        if self.window is not None:
            hidden_BSK = (positions_BSK <= newest_B11 + 1 - self.window) & (positions_BSK >= self.sink_tokens)
            rank_BSK = jnp.where(hidden_BSK, -1.0, rank_BSK)
        rank_BSK = jnp.where(positions_BSK < 0, -1.0, rank_BSK)
        _, order_BKS = top_k(jnp.swapaxes(rank_BSK, 1, 2), S, ("batch", "kv_heads"))
        order_BSK = jnp.swapaxes(order_BKS, 1, 2)

        def put(old: Array, new: Array) -> Array:
            retained = jnp.take_along_axis(new, order_BSK, axis=1)
            return jax.lax.dynamic_update_index_in_dim(old, retained, self.layer, axis=0)

        storage = self.storage.replace_layer(self.layer, self.candidates.storage.taken(order_BSK))
        return self.replace(  # type: ignore[attr-defined]
            storage=storage,
            positions_RBSK=put(self.positions_RBSK, positions_BSK),
            scores_RBSK=put(self.scores_RBSK, scores_BSK),
            candidates=None,
        )

    def end(self) -> Self:
        """The cache after the call."""
        return self.replace(new=None)  # type: ignore[attr-defined]

    def select(self, rows_B: Int[Array, " B"]) -> Self:
        """The cache of these rows."""
        positions, scores = (jnp.take(x, rows_B, axis=1) for x in (self.positions_RBSK, self.scores_RBSK))
        return self.replace(  # type: ignore[attr-defined]
            storage=self.storage.select(rows_B), positions_RBSK=positions, scores_RBSK=scores
        )

    def reset(self, rows_B: Bool[Array, " B"]) -> Self:
        """The cache with these rows empty."""
        positions_RBSK = jnp.where(rows_B[None, :, None, None], -1, self.positions_RBSK)
        return self.replace(positions_RBSK=positions_RBSK)  # type: ignore[attr-defined]

    def by_axes(self, of: ByAxes) -> Self:
        """The cache between calls of what ``of`` makes of the logical axes of each array, and the array."""
        axes = ("layers", "batch", "slots", "kv_heads")
        return self.replace(  # type: ignore[attr-defined]
            storage=self.storage.by_axes(of),
            positions_RBSK=of(axes, self.positions_RBSK),
            scores_RBSK=of(axes, self.scores_RBSK),
        )

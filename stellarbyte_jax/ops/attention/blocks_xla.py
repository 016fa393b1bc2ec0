"""Blocks of attention as products of XLA, a tile of queries and keys at a time, for every mask and a soft cap.

B batch, T queries, S keys, t queries and s keys of a tile, N query heads, K key/value heads, G = N/K, H head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.attention.blocks import NOTHING, Blocks, Gradients, Keys, Partial, Queries
from stellarbyte_jax.ops.attention.mask import Mask

TILE = 1024  # positions; float32 scores [N, TILE, TILE] are what is in memory at a time, in a few copies


@dataclass(frozen=True)
class XlaBlocks(Blocks):
    """Masks are read as they are.

    Attributes:
      window: number of keys that a query sees, itself included; None for all.
      softcap: replaces scores s by ``softcap * tanh(s / softcap)``; None for none.
    """

    whole: ClassVar[int] = TILE
    window: int | None = None
    softcap: float | None = None

    def attend(self, queries: Queries, keys: Keys) -> Partial:
        """As :class:`Blocks`."""
        T = queries.q_BTNH.shape[1]
        if max(T, keys.k_BSKH.shape[1]) <= TILE:
            return self._attend_tile(queries, keys)
        key_tiles = _tiles(keys)

        def over_keys(some: Queries) -> Partial:
            nothing = Partial(
                jnp.zeros(some.q_BTNH.shape, jnp.float32), jnp.full(some.q_BTNH.shape[:3], NOTHING, jnp.float32)
            )

            def more(found: Partial, tile: Keys) -> tuple[Partial, None]:
                return found.merged(self._attend_tile(some, tile)), None

            return jax.lax.scan(more, nothing, key_tiles)[0]

        return _untiled(jax.lax.map(over_keys, _tiles(queries)), T)

    def gradients(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """As :class:`Blocks`."""
        T, S = slope_BTNH.shape[1], keys.k_BSKH.shape[1]
        if max(T, S) <= TILE:
            return self._gradients_of_tile(queries, keys, merged, slope_BTNH)
        key_tiles = _tiles(keys)

        def over_keys(dkv: Any, given: tuple[Queries, Partial, Array]) -> tuple[Any, Array]:
            some, merged, slope = given

            def more(dq: Array, tile: Keys) -> tuple[Array, Any]:
                dq_more, dkv_more = self._gradients_of_tile(some, tile, merged, slope)
                return dq + dq_more, dkv_more

            dq, dkv_more = jax.lax.scan(more, jnp.zeros(slope.shape, jnp.float32), key_tiles)
            return jax.tree.map(jnp.add, dkv, dkv_more), dq

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (key_tiles.k_BSKH, key_tiles.v_BSKH))
        dkv, dq = jax.lax.scan(over_keys, zero, (_tiles(queries), _tiles(merged), _tiles(slope_BTNH)))
        return _untiled(dq, T), _untiled(dkv, S)

    attend_whole = attend
    gradients_whole = gradients

    def _attend_tile(self, queries: Queries, keys: Keys) -> Partial:
        return _by_rows(self._attend_rows, queries, keys)

    def _gradients_of_tile(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        return _by_rows(self._gradients_of_rows, queries, keys, merged, slope_BTNH)

    def _attend_rows(self, queries: Queries, keys: Keys) -> Partial:
        B, T, N, H = queries.q_BTNH.shape
        scores_BKGTS, allowed_BK1TS, _ = self._scores(queries, keys)
        most_BKGT = jnp.max(jnp.where(allowed_BK1TS, scores_BKGTS, NOTHING), axis=-1)
        weights_BKGTS = jnp.where(allowed_BK1TS, jnp.exp(scores_BKGTS - most_BKGT[..., None]), 0.0)
        total_BKGT = jnp.sum(weights_BKGTS, axis=-1)
        seen_BKGT = total_BKGT > 0
        total_BKGT = jnp.where(seen_BKGT, total_BKGT, 1.0)
        shares_BKGTS = (weights_BKGTS / total_BKGT[..., None]).astype(keys.v_BSKH.dtype)
        out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", shares_BKGTS, keys.v_BSKH, preferred_element_type=jnp.float32)
        lse_BKGT = jnp.where(seen_BKGT, most_BKGT + jnp.log(total_BKGT), NOTHING)
        return Partial(out_BTKGH.reshape(B, T, N, H), jnp.moveaxis(lse_BKGT, 3, 1).reshape(B, T, N))

    def _gradients_of_rows(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        B, T, N, H = queries.q_BTNH.shape
        K, dtype = keys.k_BSKH.shape[2], keys.k_BSKH.dtype
        scores_BKGTS, allowed_BK1TS, bend_BKGTS = self._scores(queries, keys)
        lse_BKGT = jnp.moveaxis(merged.lse_BTN.reshape(B, T, K, N // K), 1, 3)
        weights_BKGTS = jnp.where(allowed_BK1TS, jnp.exp(scores_BKGTS - lse_BKGT[..., None]), 0.0)
        slope_BTKGH = slope_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
        own_BTKG = jnp.sum(slope_BTKGH * merged.out_BTNH.reshape(slope_BTKGH.shape).astype(jnp.float32), axis=-1)
        narrow_BTKGH = slope_BTKGH.astype(dtype)
        wide = {"preferred_element_type": jnp.float32}
        dweights_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", narrow_BTKGH, keys.v_BSKH, **wide)
        dscores_BKGTS = weights_BKGTS * (dweights_BKGTS - jnp.moveaxis(own_BTKG, 1, 3)[..., None])
        if bend_BKGTS is not None:
            dscores_BKGTS *= bend_BKGTS
        dscores_BKGTS = (dscores_BKGTS * H**-0.5).astype(dtype)
        q_BTKGH = queries.q_BTNH.reshape(B, T, K, N // K, H)
        dq_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", dscores_BKGTS, keys.k_BSKH, **wide)
        dk_BSKH = jnp.einsum("BKGTS,BTKGH->BSKH", dscores_BKGTS, q_BTKGH, **wide)
        dv_BSKH = jnp.einsum("BKGTS,BTKGH->BSKH", weights_BKGTS.astype(dtype), narrow_BTKGH, **wide)
        return dq_BTKGH.reshape(B, T, N, H), (dk_BSKH, dv_BSKH)

    def _scores(
        self, queries: Queries, keys: Keys
    ) -> tuple[Float[Array, "B K G t s"], Array, Float[Array, "B K G t s"] | None]:
        """Scores, whether they are allowed, and the slope of the soft cap."""
        B, T, N, H = queries.q_BTNH.shape
        K = keys.k_BSKH.shape[2]
        q_BTKGH = queries.q_BTNH.reshape(B, T, K, N // K, H)
        scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, keys.k_BSKH, preferred_element_type=jnp.float32)
        scores_BKGTS *= H**-0.5
        allowed_BK1TS = self._mask(queries, keys).allowed()[:, :, None]
        if self.softcap is None:
            return scores_BKGTS, allowed_BK1TS, None
        bent_BKGTS = jnp.tanh(scores_BKGTS / self.softcap)
        return self.softcap * bent_BKGTS, allowed_BK1TS, 1 - jnp.square(bent_BKGTS)

    def _mask(self, queries: Queries, keys: Keys) -> Mask:
        return Mask(
            q_positions_BT=queries.positions_BT,
            k_positions_BSK=keys.positions_BSK,
            q_segments_BT=queries.segments_BT,
            k_segments_BS=keys.segments_BS,
            always_visible_BSK=keys.always_visible_BSK,
            window=self.window,
        )


def _by_rows(function: Callable[..., Any], *tiles: Any) -> Any:
    """The function's results for all rows, of so many at a time that their scores are not more than those of a tile."""
    B, T = jax.tree.leaves(tiles)[0].shape[:2]
    rows = max(1, (TILE // T) ** 2)
    if rows >= B:
        return function(*tiles)

    def of_row(row: Any) -> Any:
        return jax.tree.map(lambda x: x[0], function(*jax.tree.map(lambda x: x[None], row)))

    return jax.lax.map(of_row, tiles, batch_size=rows)


def _tiles(tree: Any) -> Any:
    """Every array [B, T, ...] as [tiles, B, t, ...]; what fills the last tile has position -1: nobody sees it."""

    def cut(path: tuple[Any, ...], x: Array) -> Array:
        length = x.shape[1]
        count = -(-length // TILE)
        size = -(-length // count)
        fill = -1 if "positions" in jax.tree_util.keystr(path) else 0
        padding = [(0, count * size - length if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    return jax.tree_util.tree_map_with_path(cut, tree)


def _untiled(tree: Any, length: int) -> Any:
    """What :func:`_tiles` cut, without what it filled in."""

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tree)

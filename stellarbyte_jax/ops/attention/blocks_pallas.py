"""Blocks of attention by the kernels for Hopper GPUs: packed documents, windows, pinned keys and a soft cap.

B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stellarbyte_jax.ops.attention.blocks import Blocks, Gradients, Keys, Partial, Queries
from stellarbyte_jax.ops.attention.pallas import refuse_arrays
from stellarbyte_jax.ops.pallas.flash_backward import flash_backward
from stellarbyte_jax.ops.pallas.flash_forward import flash_forward
from stellarbyte_jax.ops.pallas.seen_keys import PINNED, Seen


def refuse_pallas_blocks(q_BTNH: Array, always_visible_BSK: Array | None) -> None:
    """Raises NotImplementedError, with the reason, where :class:`PallasBlocks` cannot compute what is asked for."""
    T = q_BTNH.shape[1] // 2  # a device has two chunks
    refuse_arrays(q_BTNH, T, T)
    if T % 8:
        raise NotImplementedError(f"chunks of {T} positions: a multiple of 8 is needed")
    if always_visible_BSK is not None and always_visible_BSK.shape[2] != 1:
        raise NotImplementedError("keys that a window does not hide from some heads only")


@dataclass(frozen=True)
class PallasBlocks(Blocks):
    """Masks are read as they are.

    Attributes:
      window: number of keys that a query sees, itself included; None for all.
      softcap: replaces scores s by ``softcap * tanh(s / softcap)``; None for none.
    """

    whole: ClassVar[int] = 1 << 30
    window: int | None = None
    softcap: float | None = None

    def attend(self, queries: Queries, keys: Keys) -> Partial:
        """As :class:`Blocks`."""
        return self._attend(queries, keys, own=False)

    def gradients(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """As :class:`Blocks`."""
        return self._gradients(queries, keys, merged, slope_BTNH, own=False)

    def attend_whole(self, queries: Queries, keys: Keys) -> Partial:
        """As :class:`Blocks`."""
        return self._attend(queries, keys, own=True)

    def gradients_whole(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """As :class:`Blocks`."""
        return self._gradients(queries, keys, merged, slope_BTNH, own=True)

    def _attend(self, queries: Queries, keys: Keys, own: bool) -> Partial:
        seen = self._seen(queries, keys, own)
        out_BTNH, lse_BNT = flash_forward(queries.q_BTNH, keys.k_BSKH, keys.v_BSKH, seen, self.softcap)
        return Partial(out_BTNH.astype(jnp.float32), jnp.swapaxes(lse_BNT, 1, 2))

    def _gradients(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array, own: bool) -> Gradients:
        q_BTNH = queries.q_BTNH
        slopes_BNT = jnp.einsum("BTNH,BTNH->BNT", slope_BTNH.astype(jnp.float32), merged.out_BTNH.astype(jnp.float32))
        dq_BTNH, dk_BSKH, dv_BSKH = flash_backward(
            q_BTNH,
            keys.k_BSKH,
            keys.v_BSKH,
            slope_BTNH.astype(q_BTNH.dtype),
            jnp.swapaxes(merged.lse_BTN, 1, 2),
            slopes_BNT,
            self._seen(queries, keys, own),
            self.softcap,
        )
        return dq_BTNH.astype(jnp.float32), (dk_BSKH.astype(jnp.float32), dv_BSKH.astype(jnp.float32))

    def _seen(self, queries: Queries, keys: Keys, own: bool) -> Seen:
        S, places_BS = keys.k_BSKH.shape[1], keys.positions_BSK[:, :, 0]
        first_BT = document_BT = _documents(queries, keys, own)
        if self.window is not None:
            earliest_BT = queries.positions_BT - (self.window - 1)
            first_BT = jnp.maximum(
                document_BT, jax.vmap(partial(jnp.searchsorted, side="left"))(places_BS, earliest_BT)
            )
        kinds_BS = None
        if self.window is not None and keys.always_visible_BSK is not None:
            kinds_BS = jnp.where(keys.always_visible_BSK[:, :, 0], PINNED, 1)
        return Seen(first_BT.astype(jnp.int32), document_BT, kinds_BS, 0 if own else S, S)


def _documents(queries: Queries, keys: Keys, own: bool) -> Array:
    """The first key of each query's document; behind all keys where there is none of it."""
    S = keys.k_BSKH.shape[1]
    if keys.segments_BS is None or queries.segments_BT is None:
        return jnp.zeros(queries.q_BTNH.shape[:2], jnp.int32)
    places_1S = jnp.arange(S, dtype=jnp.int32)[None]
    changes_BS = keys.segments_BS[:, 1:] != keys.segments_BS[:, :-1]
    begins_BS = jnp.pad(changes_BS, ((0, 0), (1, 0)), constant_values=True)
    starts_BS = jax.lax.cummax(jnp.where(begins_BS, places_1S, 0), axis=1)
    if own:
        return starts_BS
    # Queries are later than all keys: the last document alone can reach them.
    reached_BT = queries.segments_BT == keys.segments_BS[:, -1:]
    return jnp.where(reached_BT, starts_BS[:, -1:], S)

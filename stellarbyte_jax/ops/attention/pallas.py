"""Attention by kernels for Hopper GPUs: any number of packed documents, windows, pinned keys and a soft cap.

Tiles of keys that no query of a tile sees are not read. B batch, T queries, S keys, N query heads, K key/value heads, H
head size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.attention.decode_pallas import attention_over_cache
from stellarbyte_jax.ops.attention.mask import Mask
from stellarbyte_jax.ops.attention.options import AttentionOutput, Options
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.flash_backward import flash_backward
from stellarbyte_jax.ops.pallas.flash_forward import flash_forward
from stellarbyte_jax.ops.pallas.seen_keys import Seen, seen_keys
from stellarbyte_jax.ops.stored import Stored

_SHORTEST = 128  # rows: a tile


def pallas_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    options: Options,
) -> AttentionOutput:
    """As :func:`attention`. Gradients are sums in a fixed order: the same inputs give the same bits.

    Over a cache there are no gradients.

    Raises:
      NotImplementedError: the kernels do not support the arguments or the device.
    """
    _refuse_options(options)
    if not mask.aligned:
        return attention_over_cache(q_BTNH, options.stored or Stored.alone(k_BSKH, v_BSKH), mask, options)
    if mask.always_visible_BSK is not None and mask.always_visible_BSK.shape[2] != 1:
        raise NotImplementedError("keys that a window does not hide from some heads only")
    refuse_arrays(q_BTNH, q_BTNH.shape[1], k_BSKH.shape[1])
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    segments_BS = jnp.zeros((B, S), jnp.int32) if mask.k_segments_BS is None else mask.k_segments_BS
    pinned_BS = None if mask.always_visible_BSK is None else mask.always_visible_BSK[:, :, 0]
    segments_BS, pinned_BS, valid_BS = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (B, S)), (segments_BS, pinned_BS, mask.k_valid_BS)
    )
    seen = seen_keys(T, segments_BS, mask.window, pinned_BS, valid_BS)
    # Copies cut arrays into tiles of 8 rows. Keys behind the last one are later than all queries.
    q_BTNH, k_BSKH, v_BSKH = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH)
    )
    found: Any = _attention(options.softcap, q_BTNH, k_BSKH, v_BSKH, seen)
    out_BTNH, lse_BNT = found
    return AttentionOutput(out_BTNH[:, :T], None, jnp.swapaxes(lse_BNT, 1, 2)[:, :T] if options.return_lse else None)


def _refuse_options(options: Options) -> None:
    """Raises NotImplementedError, with the reason, where the kernels do not compute what is asked for."""
    if options.prune_below > 0.0:
        raise NotImplementedError("pruning of low weights")
    if options.dropout is not None and options.dropout.rate > 0.0:
        raise NotImplementedError("attention dropout")
    if options.return_weights:
        raise NotImplementedError("attention weights as a result")


def refuse_arrays(q_BTNH: Array, queries: int, keys: int) -> None:
    """Raises NotImplementedError, with the reason, where the kernels do not take such arrays on this device."""
    H = q_BTNH.shape[3]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {q_BTNH.dtype}")
    if H not in (64, 128):
        raise NotImplementedError(f"head size {H}: 64 or 128 is needed")
    if queries > keys or queries < _SHORTEST:
        raise NotImplementedError(
            f"{queries} queries of {keys} keys: at least {_SHORTEST}, and not more than keys, are needed"
        )
    if not compat.runs_here():
        raise NotImplementedError("the kernels need an NVIDIA Hopper GPU (compute capability 9.0)")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(softcap: float | None, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, seen: Seen) -> tuple[Array, Array]:
    return flash_forward(q_BTNH, k_BSKH, v_BSKH, seen, softcap)


def _forward(
    softcap: float | None, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, seen: Seen
) -> tuple[tuple[Array, Array], Any]:
    found = flash_forward(q_BTNH, k_BSKH, v_BSKH, seen, softcap)
    return found, (q_BTNH, k_BSKH, v_BSKH, seen, *found)


def _backward(softcap: float | None, kept: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, None]:
    q_BTNH, k_BSKH, v_BSKH, seen, out_BTNH, lse_BNT = kept
    do_BTNH, dlse_BNT = cotangents
    slopes_BNT = jnp.einsum("BTNH,BTNH->BNT", do_BTNH.astype(jnp.float32), out_BTNH.astype(jnp.float32)) - dlse_BNT
    return *flash_backward(q_BTNH, k_BSKH, v_BSKH, do_BTNH, lse_BNT, slopes_BNT, seen, softcap), None


_attention.defvjp(_forward, _backward)

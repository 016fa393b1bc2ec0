"""Attention of few queries over a cache by kernels for Hopper GPUs: keys and values are read where they are stored.

B batch, T queries, S slots, N query heads, K key/value heads, H head size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.attention.mask import Mask
from stellarbyte_jax.ops.attention.options import AttentionOutput, Options
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.decode import MOST_QUERIES, PINNED, TILE, decode_attention
from stellarbyte_jax.ops.stored import Stored

_STORED = ("bfloat16", "float16", "int8", "float8_e4m3fn")


def attention_over_cache(
    q_BTNH: Float[Array, "B T N H"], stored: Stored, mask: Mask, options: Options
) -> AttentionOutput:
    """As :func:`attention`, over what is stored. The same inputs give the same bits.

    Raises:
      NotImplementedError: the kernels do not support the arguments or the device.
    """
    _refuse(q_BTNH, stored, mask)
    B, S = q_BTNH.shape[0], stored.keys.shape[2]
    places_BS = jnp.broadcast_to(_places(mask), (B, S))
    positions_BT = jnp.broadcast_to(mask.q_positions_BT, q_BTNH.shape[:2])
    first_B, end_B = _range(mask) if stored.ends_B is None else (None, stored.ends_B)
    first_B, end_B = None if first_B is None else jnp.broadcast_to(first_B, (B,)), jnp.broadcast_to(end_B, (B,))
    out_BTNH, lse_BTN = decode_attention(
        q_BTNH, stored, places_BS, positions_BT, first_B, end_B, mask.window, options.softcap
    )
    return AttentionOutput(out_BTNH, None, lse_BTN if options.return_lse else None)


def _places(mask: Mask) -> Int[Array, "B S"]:
    """What the kernel is told of each slot: see :func:`decode_attention`."""
    places_BS = mask.k_positions_BSK[:, :, 0]
    if mask.window is not None and mask.always_visible_BSK is not None:
        # Of a slot without a key that is a position later than all queries.
        places_BS = jnp.where(mask.always_visible_BSK[:, :, 0], places_BS + PINNED, places_BS)
    return places_BS if mask.k_valid_BS is None else jnp.where(mask.k_valid_BS, places_BS, -1)


def _range(mask: Mask) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """The first slot that a query of the row sees, and the one behind the last; 0 and 0 where it sees none."""
    seen_BS = jnp.any(mask.allowed(), axis=(1, 2))
    S = seen_BS.shape[1]
    slots_1S = jnp.arange(S, dtype=jnp.int32)[None]
    end_B = jnp.max(jnp.where(seen_BS, slots_1S + 1, 0), axis=1)
    return jnp.minimum(jnp.min(jnp.where(seen_BS, slots_1S, S), axis=1), end_B), end_B


def _refuse(q_BTNH: Array, stored: Stored, mask: Mask) -> None:
    """Raises NotImplementedError, with the reason, where the kernels do not compute what is asked for."""
    (_, T, N, H), (S, K) = q_BTNH.shape, stored.keys.shape[2:4]
    if mask.k_positions_BSK.shape[2] != 1 or (
        mask.always_visible_BSK is not None and mask.always_visible_BSK.shape[2] != 1
    ):
        raise NotImplementedError("keys of a cache that differ from head to head")
    if mask.q_segments_BT is not None and mask.k_segments_BS is not None:
        raise NotImplementedError("a cache of several documents")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {q_BTNH.dtype}")
    if stored.dtype not in _STORED:
        raise NotImplementedError(f"a cache of {stored.dtype}")
    if H not in (64, 128):
        raise NotImplementedError(f"head size {H}: 64 or 128 is needed")
    if T * (N // K) > MOST_QUERIES:
        raise NotImplementedError(f"{T} queries of {N // K} heads: at most {MOST_QUERIES} read the same keys")
    if S % 2 or S < TILE:
        raise NotImplementedError(f"{S} slots: an even number, and at least {TILE}, is needed")
    if not compat.runs_here():
        raise NotImplementedError("the kernels need an NVIDIA Hopper GPU (compute capability 9.0)")

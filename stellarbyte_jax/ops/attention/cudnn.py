"""Attention by the fused cuDNN kernels, packed documents included.

B batch, T queries, S keys, N query heads, K key/value heads, H head size, M documents of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.attention.mask import Mask
from stellarbyte_jax.ops.attention.options import AttentionOutput, Options
from stellarbyte_jax.ops.attention.xla import refuse_unfusable


def cudnn_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    options: Options,
) -> AttentionOutput:
    """As :func:`attention`. Where there are fewer queries than keys, empty ones are put in front and cut off again.

    Raises:
      NotImplementedError: the kernels do not support the arguments or the device.
    """
    refuse_unfusable(options)
    if not mask.aligned:
        raise NotImplementedError("keys that are not in the order of the row (a cache)")
    if mask.always_visible_BSK is not None:
        raise NotImplementedError("keys that a window does not hide (sink tokens, compressed memory)")
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    refuse_queries(q_BTNH)
    if S % 2:
        raise NotImplementedError(f"{S} positions: its backward pass needs an even number")
    q_BSNH = jnp.pad(q_BTNH, ((0, 0), (S - T, 0), (0, 0), (0, 0)))
    segments_BS, max_segments = _segments(mask)
    if segments_BS is None:
        # is_causal must stay on with a window: without it this kernel lets tokens see the future.
        found: Any = jax.nn.dot_product_attention(
            q_BSNH,
            k_BSKH,
            v_BSKH,
            is_causal=True,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation="cudnn",
            return_residual=options.return_lse,
        )
        out_BSNH, lse_BSN = found if options.return_lse else (found, None)
        return AttentionOutput(out_BSNH[:, S - T :], None, None if lse_BSN is None else lse_BSN[:, S - T :])
    if options.return_lse:
        raise NotImplementedError("the log-sum-exp of packed documents")
    if max_segments is None:
        raise NotImplementedError("packed documents without max_segments")
    return AttentionOutput(_packed(q_BSNH, k_BSKH, v_BSKH, segments_BS, max_segments, mask.window)[:, S - T :])


def refuse_queries(q_BTNH: Float[Array, "B T N H"]) -> None:
    """Raises NotImplementedError, with the reason, where no fused kernel takes such queries on this device."""
    H = q_BTNH.shape[3]
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"the {jax.default_backend()} backend")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {q_BTNH.dtype}")
    if H % 8 or H > 256:
        raise NotImplementedError(f"head size {H}: a multiple of 8 up to 256 is needed")


def _segments(mask: Mask) -> tuple[Array | None, int | None]:
    """The document of each key and the number of them; keys that nobody sees are one more, before the others."""
    if mask.k_valid_BS is None:
        return mask.k_segments_BS, mask.max_segments
    ids_BS = jnp.ones_like(mask.k_valid_BS, jnp.int32) if mask.k_segments_BS is None else mask.k_segments_BS
    count = 1 if mask.k_segments_BS is None else mask.max_segments
    return jnp.where(mask.k_valid_BS, ids_BS, -1), None if count is None else count + 1


def _packed(
    q_BSNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BS: Array, max_segments: int, window: int | None
) -> Array:
    # Not public in jax.nn. A boolean mask would be, but as a [T, T] bias in memory.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    B, _, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    if K != N:
        # The packed kernel takes the offsets of keys from the number of query heads.
        k_BSKH, v_BSKH = jnp.repeat(k_BSKH, N // K, axis=2), jnp.repeat(v_BSKH, N // K, axis=2)
    starts_BM, lengths_BM, count_B = segment_bounds(segments_BS, max(2, max_segments))
    offsets = jnp.concatenate([starts_BM, jnp.full((B, 1), -1, jnp.int32)], axis=1)
    out_BSNH: Any = dot_product_attention(
        query=q_BSNH,
        key=k_BSKH,
        value=v_BSKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=H**-0.5,
        mask_type=MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )
    fits_B = count_B <= starts_BM.shape[1]
    return jnp.where(fits_B[:, None, None, None], out_BSNH, jnp.nan)


def segment_bounds(
    segment_ids_BT: Int[Array, "B T"], max_segments: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M"], Int[Array, " B"]]:
    """Start and length of each run of equal segment ids, -1 where a row has fewer than ``max_segments``; and the count.

    Padding (id 0) is a run as any other, so that every position of a row belongs to one.
    """
    B, T = segment_ids_BT.shape
    change_BT = jnp.concatenate([jnp.ones((B, 1), bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1)
    index_BT = jnp.cumsum(change_BT, axis=1, dtype=jnp.int32) - 1
    rows_BT = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, T))
    columns_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    starts_BM = jnp.full((B, max_segments), T, jnp.int32).at[rows_BT, index_BT].min(columns_BT, mode="drop")
    lengths_BM = jnp.zeros((B, max_segments), jnp.int32).at[rows_BT, index_BT].add(1, mode="drop")
    used_BM = lengths_BM > 0
    return jnp.where(used_BM, starts_BM, -1), jnp.where(used_BM, lengths_BM, -1), index_BT[:, -1] + 1

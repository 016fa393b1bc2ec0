"""Causal attention over a sequence, and attention of new tokens over keys and values that are kept.

B batch, T query positions, S key positions, N query heads, K key/value heads, G = N/K, H head size, M documents a row.
Query head n reads key/value head n // G. Implementations have one signature; see ``dispatch.py``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from stellarbyte_jax.ops.dispatch import dispatch

_MASKED = -1e30  # finite: a row without any key gives numbers and not NaN


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    window: int | None = None,
    pinned_BT: Bool[Array, "B T"] | None = None,
    logit_softcap: float | None = None,
    prune_below: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    max_segments: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal softmax attention, ``softmax(q k^T / sqrt(H)) v``, with the softmax in float32.

    A token attends to itself and to earlier tokens of the same segment, no further back than ``window - 1`` tokens
    but for pinned ones.

    Args:
      q_BTNH: queries, already rotated.
      k_BTKH: keys; K divides N.
      v_BTKH: values.
      segment_ids_BT: document of each token; equal ids must be neighbours.
      window: number of keys a token sees, itself included; None for all.
      pinned_BT: keys that a window does not hide.
      logit_softcap: replaces scores s by ``cap * tanh(s / cap)``.
      prune_below: keys with less than this share of a query's largest weight get none.
      dropout_rate: share of attention weights set to zero.
      dropout_key: needed where ``dropout_rate`` is above zero.
      max_segments: upper bound on the segments of a row; the cuDNN kernel needs it, and gives NaN where it is exceeded.
      implementation: ``"auto"``, ``"reference"``, ``"xla"`` or ``"cudnn"``.

    Raises:
      NotImplementedError: the implementation named does not support the arguments.
    """
    return dispatch(
        "attention",
        implementation,
        {"cudnn": _cudnn, "xla": _xla, "reference": _reference},
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segment_ids_BT=segment_ids_BT,
        window=window,
        pinned_BT=pinned_BT,
        logit_softcap=logit_softcap,
        prune_below=prune_below,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        max_segments=max_segments,
    )


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    positions_BT: Int[Array, "B T"],
    key_positions_BSK: Int[Array, "B S #K"],
    *,
    window: int | None = None,
    pinned_slots: int = 0,
    sink_tokens: int = 0,
    logit_softcap: float | None = None,
    prune_below: float = 0.0,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K G T S"]]:
    """Attention of tokens at ``positions_BT`` over keys at ``key_positions_BSK``, -1 where a slot is empty.

    The window hides neither keys in the first ``pinned_slots`` nor those at the first ``sink_tokens`` positions, which
    may stand in any slot.

    Returns:
      The output, and the attention weights, float32.
    """
    keys_BKS = jnp.swapaxes(key_positions_BSK, 1, 2)
    distance_BKTS = positions_BT[:, None, :, None] - keys_BKS[:, :, None, :]
    allowed_BKTS = (distance_BKTS >= 0) & (keys_BKS[:, :, None, :] >= 0)
    if window is not None:
        near_BKTS = distance_BKTS < window
        if pinned_slots:
            near_BKTS |= (jnp.arange(k_BSKH.shape[1]) < pinned_slots)[None, None, None, :]
        if sink_tokens:
            near_BKTS |= keys_BKS[:, :, None, :] < sink_tokens
        allowed_BKTS &= near_BKTS
    return _softmax_attention(q_BTNH, k_BSKH, v_BSKH, allowed_BKTS, logit_softcap, prune_below, 0.0, None)


def _softmax_attention(q_BTNH, k_BSKH, v_BSKH, allowed_BKTS, logit_softcap, prune_below, dropout_rate, dropout_key):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS * H**-0.5
    if logit_softcap is not None:
        scores_BKGTS = logit_softcap * jnp.tanh(scores_BKGTS / logit_softcap)
    scores_BKGTS = jnp.where(allowed_BKTS[:, :, None, :, :], scores_BKGTS, _MASKED)
    if prune_below > 0.0:
        least_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True) + jnp.log(prune_below)
        scores_BKGTS = jnp.where(scores_BKGTS < least_BKGT1, _MASKED, scores_BKGTS)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    kept_BKGTS = weights_BKGTS
    if dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError("attention dropout needs a dropout_key")
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BKGTS.shape)
        kept_BKGTS = jnp.where(keep, weights_BKGTS / (1.0 - dropout_rate), 0.0)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", kept_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(B, T, N, H), weights_BKGTS


def _causal_mask(T: int, segment_ids_BT, window: int | None, pinned_BT) -> Bool[Array, "B T T"]:
    distance_TT = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    allowed_BTT = (distance_TT >= 0)[None]
    if window is not None:
        near_BTT = (distance_TT < window)[None]
        if pinned_BT is not None:
            near_BTT = near_BTT | pinned_BT[:, None, :]
        allowed_BTT = allowed_BTT & near_BTT
    if segment_ids_BT is not None:
        allowed_BTT = allowed_BTT & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    return allowed_BTT


def _reference(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    *,
    segment_ids_BT,
    window,
    pinned_BT,
    logit_softcap,
    prune_below,
    dropout_rate,
    dropout_key,
    max_segments,
):
    del max_segments
    allowed_BKTT = _causal_mask(q_BTNH.shape[1], segment_ids_BT, window, pinned_BT)[:, None]
    out_BTNH, _ = _softmax_attention(
        q_BTNH, k_BTKH, v_BTKH, allowed_BKTT, logit_softcap, prune_below, dropout_rate, dropout_key
    )
    return out_BTNH


def _refuse_unfusable(logit_softcap, prune_below, dropout_rate) -> None:
    if logit_softcap is not None:
        raise NotImplementedError("a logit soft cap")
    if prune_below > 0.0:
        raise NotImplementedError("pruning of low weights")
    if dropout_rate > 0.0:
        raise NotImplementedError("attention dropout")


def _xla(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    *,
    segment_ids_BT,
    window,
    pinned_BT,
    logit_softcap,
    prune_below,
    dropout_rate,
    dropout_key,
    max_segments,
):
    del dropout_key, max_segments
    _refuse_unfusable(logit_softcap, prune_below, dropout_rate)
    mask = None
    if pinned_BT is not None:
        mask = _causal_mask(q_BTNH.shape[1], segment_ids_BT, window, pinned_BT)[:, None]
        window = None
    elif segment_ids_BT is not None:
        mask = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 and float32 inside
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=mask,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="xla",
        )


def _cudnn(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    *,
    segment_ids_BT,
    window,
    pinned_BT,
    logit_softcap,
    prune_below,
    dropout_rate,
    dropout_key,
    max_segments,
):
    del dropout_key
    _refuse_unfusable(logit_softcap, prune_below, dropout_rate)
    if pinned_BT is not None:
        raise NotImplementedError("keys that a window does not hide (sink tokens, fused memory)")
    B, T, N, H = q_BTNH.shape
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"the {jax.default_backend()} backend")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {q_BTNH.dtype}")
    if H % 8 or H > 256:
        raise NotImplementedError(f"head size {H}: a multiple of 8 up to 256 is needed")
    if T % 2:
        raise NotImplementedError(f"{T} positions: its backward pass needs an even number")
    if segment_ids_BT is None:
        # is_causal must stay on with a window: without it this kernel lets tokens see the future.
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    if max_segments is None:
        raise NotImplementedError("packed documents without max_segments")
    # Not public in jax.nn. A boolean mask would be, but as a [T, T] bias in memory.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    K = k_BTKH.shape[2]
    if K != N:
        # The packed kernel takes the offsets of keys from the number of query heads.
        k_BTKH, v_BTKH = jnp.repeat(k_BTKH, N // K, axis=2), jnp.repeat(v_BTKH, N // K, axis=2)
    starts_BM, lengths_BM, count_B = segment_bounds(segment_ids_BT, max(2, max_segments))
    offsets = jnp.concatenate([starts_BM, jnp.full((B, 1), -1, jnp.int32)], axis=1)
    out_BTNH: Any = dot_product_attention(
        query=q_BTNH,
        key=k_BTKH,
        value=v_BTKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=H**-0.5,
        mask_type=MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )
    fits_B = count_B <= starts_BM.shape[1]
    return jnp.where(fits_B[:, None, None, None], out_BTNH, jnp.nan)


def segment_bounds(
    segment_ids_BT: Int[Array, "B T"], max_segments: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M"], Int[Array, " B"]]:
    """Start and length of each run of equal segment ids, -1 where a row has fewer than ``max_segments``; and the count.

    Padding (id 0) is a run as any other, so that no position of a row is left out.
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

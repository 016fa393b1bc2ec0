"""Causal attention over a sequence, and attention of new tokens over a key/value cache.

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
    logit_softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    max_segments: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal softmax attention, ``softmax(q k^T / sqrt(H)) v``, with the softmax in float32.

    A token attends to itself and to earlier tokens of the same segment, no further back than ``window - 1`` tokens.

    Args:
      q_BTNH: queries, already rotated.
      k_BTKH: keys; K divides N.
      v_BTKH: values.
      segment_ids_BT: document of each token; equal ids must be neighbours.
      window: number of keys a token sees, itself included; None for all.
      logit_softcap: replaces scores s by ``cap * tanh(s / cap)``.
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
        logit_softcap=logit_softcap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        max_segments=max_segments,
    )


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    positions_BT: Int[Array, "B T"],
    *,
    window: int | None = None,
    logit_softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of tokens at ``positions_BT`` over a cache whose slot s holds the key of position s."""
    slots_S = jnp.arange(k_BSKH.shape[1], dtype=positions_BT.dtype)
    distance_BTS = positions_BT[:, :, None] - slots_S[None, None, :]
    allowed_BTS = distance_BTS >= 0
    if window is not None:
        allowed_BTS &= distance_BTS < window
    return _softmax_attention(q_BTNH, k_BSKH, v_BSKH, allowed_BTS, logit_softcap, 0.0, None)


def _softmax_attention(q_BTNH, k_BSKH, v_BSKH, allowed_BTS, logit_softcap, dropout_rate, dropout_key):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS * H**-0.5
    if logit_softcap is not None:
        scores_BKGTS = logit_softcap * jnp.tanh(scores_BKGTS / logit_softcap)
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None, :, :], scores_BKGTS, _MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError("attention dropout needs a dropout_key")
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BKGTS.shape)
        weights_BKGTS = jnp.where(keep, weights_BKGTS / (1.0 - dropout_rate), 0.0)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def _causal_mask(T: int, segment_ids_BT, window: int | None) -> Bool[Array, "B T T"]:
    distance_TT = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    allowed_TT = distance_TT >= 0
    if window is not None:
        allowed_TT &= distance_TT < window
    allowed_BTT = allowed_TT[None]
    if segment_ids_BT is not None:
        allowed_BTT = allowed_BTT & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    return allowed_BTT


def _reference(
    q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT, window, logit_softcap, dropout_rate, dropout_key, max_segments
):
    del max_segments
    allowed_BTT = _causal_mask(q_BTNH.shape[1], segment_ids_BT, window)
    return _softmax_attention(q_BTNH, k_BTKH, v_BTKH, allowed_BTT, logit_softcap, dropout_rate, dropout_key)


def _refuse_unfusable(logit_softcap, dropout_rate) -> None:
    if logit_softcap is not None:
        raise NotImplementedError("a logit soft cap")
    if dropout_rate > 0.0:
        raise NotImplementedError("attention dropout")


def _xla(q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT, window, logit_softcap, dropout_rate, dropout_key, max_segments):
    del dropout_key, max_segments
    _refuse_unfusable(logit_softcap, dropout_rate)
    mask = None
    if segment_ids_BT is not None:
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


def _cudnn(q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT, window, logit_softcap, dropout_rate, dropout_key, max_segments):
    del dropout_key
    _refuse_unfusable(logit_softcap, dropout_rate)
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

"""Attention by its definition: correct for all arguments, with all scores in memory.

B batch, T queries, S keys, N query heads, K key/value heads, G = N/K, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.attention.mask import Mask
from stellarbyte_jax.ops.attention.options import AttentionOutput, Options

_MASKED = -1e30  # finite: a row without any key gives numbers and not NaN


def reference_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    options: Options,
) -> AttentionOutput:
    """As :func:`attention`; refuses nothing."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS * H**-0.5
    if options.softcap is not None:
        scores_BKGTS = options.softcap * jnp.tanh(scores_BKGTS / options.softcap)
    scores_BKGTS = jnp.where(mask.allowed()[:, :, None, :, :], scores_BKGTS, _MASKED)
    if options.prune_below > 0.0:
        least_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True) + jnp.log(options.prune_below)
        scores_BKGTS = jnp.where(scores_BKGTS < least_BKGT1, _MASKED, scores_BKGTS)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    dropped_BKGTS = weights_BKGTS
    if options.dropout is not None and options.dropout.rate > 0.0:
        keep = jax.random.bernoulli(options.dropout.key, 1.0 - options.dropout.rate, weights_BKGTS.shape)
        dropped_BKGTS = jnp.where(keep, weights_BKGTS / (1.0 - options.dropout.rate), 0.0)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", dropped_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    lse_BTN = None
    if options.return_lse:
        lse_BKGT = jax.nn.logsumexp(scores_BKGTS, axis=-1)
        lse_BTN = jnp.moveaxis(lse_BKGT, 3, 1).reshape(B, T, N)
    return AttentionOutput(out_BTKGH.reshape(B, T, N, H), weights_BKGTS if options.return_weights else None, lse_BTN)

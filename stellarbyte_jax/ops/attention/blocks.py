"""Attention over some of the keys, to be merged with that over others, and its gradients from the merged result.

Dao et al. 2022, https://arxiv.org/abs/2205.14135. B batch, T queries, S keys, N query heads, K key/value heads,
G = N/K, H head size.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.attention.mask import Mask

NOTHING = -1e30  # log-sum-exp of a query that sees no key


class Partial(NamedTuple):
    """What queries made of the keys so far.

    Attributes:
      out_BTNH: float32 weighted means of the values; zeros for a query that saw no key.
      lse_BTN: float32 log-sum-exp of the scores; ``NOTHING`` there.
    """

    out_BTNH: Array
    lse_BTN: Array

    def merged(self, other: "Partial") -> "Partial":
        """Over the keys of both."""
        lse_BTN = jnp.logaddexp(self.lse_BTN, other.lse_BTN)
        own_BTN1, others_BTN1 = (jnp.exp(part.lse_BTN - lse_BTN)[..., None] for part in (self, other))
        seen_BTN1 = (lse_BTN > NOTHING / 2)[..., None]
        out_BTNH = jnp.where(seen_BTN1, self.out_BTNH * own_BTN1 + other.out_BTNH * others_BTN1, 0.0)
        return Partial(out_BTNH, jnp.where(seen_BTN1[..., 0], lse_BTN, NOTHING))


def attend_block(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    softcap: float | None = None,
) -> Partial:
    """Attention over these keys alone, with all scores in memory."""
    B, T, N, H = q_BTNH.shape
    scores_BKGTS, allowed_BK1TS, _ = _scores(q_BTNH, k_BSKH, mask, softcap)
    most_BKGT = jnp.max(jnp.where(allowed_BK1TS, scores_BKGTS, NOTHING), axis=-1)
    weights_BKGTS = jnp.where(allowed_BK1TS, jnp.exp(scores_BKGTS - most_BKGT[..., None]), 0.0)
    total_BKGT = jnp.sum(weights_BKGTS, axis=-1)
    seen_BKGT = total_BKGT > 0
    total_BKGT = jnp.where(seen_BKGT, total_BKGT, 1.0)
    shares_BKGTS = weights_BKGTS / total_BKGT[..., None]
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", shares_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    lse_BKGT = jnp.where(seen_BKGT, most_BKGT + jnp.log(total_BKGT), NOTHING)
    return Partial(out_BTKGH.reshape(B, T, N, H), jnp.moveaxis(lse_BKGT, 3, 1).reshape(B, T, N))


def block_gradients(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    softcap: float | None,
    merged: Partial,
    slope_BTNH: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients, float32, by way of these keys alone: of queries, keys and values.

    Args:
      q_BTNH: queries.
      k_BSKH: keys of the block.
      v_BSKH: their values.
      mask: what sees what of them.
      softcap: as for :func:`attend_block`.
      merged: attention over all keys.
      slope_BTNH: gradient of its result.
    """
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BSKH.shape[2], k_BSKH.dtype
    scores_BKGTS, allowed_BK1TS, bend_BKGTS = _scores(q_BTNH, k_BSKH, mask, softcap)
    lse_BKGT = jnp.moveaxis(merged.lse_BTN.reshape(B, T, K, N // K), 1, 3)
    weights_BKGTS = jnp.where(allowed_BK1TS, jnp.exp(scores_BKGTS - lse_BKGT[..., None]), 0.0)
    slope_BTKGH = slope_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    own_BTKG = jnp.sum(slope_BTKGH * merged.out_BTNH.reshape(slope_BTKGH.shape), axis=-1)
    narrow_BTKGH = slope_BTKGH.astype(dtype)
    dweights_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", narrow_BTKGH, v_BSKH, preferred_element_type=jnp.float32)
    dscores_BKGTS = weights_BKGTS * (dweights_BKGTS - jnp.moveaxis(own_BTKG, 1, 3)[..., None])
    if bend_BKGTS is not None:
        dscores_BKGTS *= bend_BKGTS
    dscores_BKGTS = (dscores_BKGTS * H**-0.5).astype(dtype)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    wide = {"preferred_element_type": jnp.float32}
    dq_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", dscores_BKGTS, k_BSKH, **wide)
    dk_BSKH = jnp.einsum("BKGTS,BTKGH->BSKH", dscores_BKGTS, q_BTKGH, **wide)
    dv_BSKH = jnp.einsum("BKGTS,BTKGH->BSKH", weights_BKGTS.astype(dtype), narrow_BTKGH, **wide)
    return dq_BTKGH.reshape(B, T, N, H), dk_BSKH, dv_BSKH


def _scores(
    q_BTNH: Array, k_BSKH: Array, mask: Mask, softcap: float | None
) -> tuple[Float[Array, "B K G T S"], Array, Float[Array, "B K G T S"] | None]:
    """Scores, whether they are allowed, and the slope of the soft cap."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    allowed_BK1TS = mask.allowed()[:, :, None]
    if softcap is None:
        return scores_BKGTS, allowed_BK1TS, None
    bent_BKGTS = jnp.tanh(scores_BKGTS / softcap)
    return softcap * bent_BKGTS, allowed_BK1TS, 1 - jnp.square(bent_BKGTS)

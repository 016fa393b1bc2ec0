"""Kernels with the contract of cuDNN's for blocks, in float32 on any device.

Outside of the lengths, and where a length is 0, they give no numbers.
"""

import jax
import jax.numpy as jnp
from jax import Array

from stellarbyte_jax.ops.attention.blocks import Partial

Lengths = tuple[Array, Array]


def _hidden(q: Array, k: Array, causal: bool, lengths: Lengths | None) -> tuple[Array, Array | None, Array | None]:
    rows, columns = jnp.arange(q.shape[1])[None, :, None], jnp.arange(k.shape[1])[None, None, :]
    shown = jnp.broadcast_to(rows >= columns if causal else True, (q.shape[0], q.shape[1], k.shape[1]))
    if lengths is None:
        return shown, None, None
    of_q, of_k = (jnp.where(jnp.all(lengths[0] * lengths[1] > 0), n, 0)[:, None, None] for n in lengths)
    return shown & (rows < of_q) & (columns < of_k), rows < of_q, jnp.swapaxes(columns, 1, 2) < of_k


def _scores(q: Array, k: Array) -> Array:
    return jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]), k) * q.shape[3] ** -0.5


def fake_forward(q: Array, k: Array, v: Array, causal: bool, lengths: Lengths | None) -> tuple[Array, Array]:
    """In place of ``blocks_cudnn._forward``."""
    shown, real, _ = _hidden(q, k, causal, lengths)
    scores = jnp.where(shown[:, None, None], _scores(q, k), -jnp.inf)
    lse = jax.scipy.special.logsumexp(scores, axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", jnp.exp(scores - lse[..., None]), v).reshape(q.shape)
    lse = lse.reshape(q.shape[0], q.shape[2], q.shape[1])
    if real is None:
        return out, lse
    return jnp.where(real[..., None], out, jnp.nan), jnp.where(real[..., 0][:, None], lse, jnp.nan)


def fake_backward(
    q: Array, k: Array, v: Array, merged: Partial, slope: Array, causal: bool, lengths: Lengths | None
) -> tuple[Array, Array, Array]:
    """In place of ``blocks_cudnn._backward``."""
    shown, real, of_key = _hidden(q, k, causal, lengths)
    shape = (q.shape[0], q.shape[1], k.shape[2], q.shape[2] // k.shape[2])
    lse = jnp.moveaxis(merged.lse_BTN.reshape(shape), 1, 3)[..., None]
    weights = jnp.where(shown[:, None, None], jnp.exp(_scores(q, k) - lse), 0.0)
    own = jnp.moveaxis(jnp.sum(slope * merged.out_BTNH, axis=-1).reshape(shape), 1, 3)[..., None]
    slope = slope.reshape(*shape, -1)
    dscores = weights * (jnp.einsum("BTKGH,BSKH->BKGTS", slope, v) - own) * q.shape[3] ** -0.5
    dq = jnp.einsum("BKGTS,BSKH->BTKGH", dscores, k).reshape(q.shape)
    dk = jnp.einsum("BKGTS,BTKGH->BSKH", dscores, q.reshape(*shape, -1))
    dv = jnp.einsum("BKGTS,BTKGH->BSKH", weights, slope)
    if real is None:
        return dq, dk, dv
    return jnp.where(real[..., None], dq, jnp.nan), *(jnp.where(of_key[..., None], d, jnp.nan) for d in (dk, dv))

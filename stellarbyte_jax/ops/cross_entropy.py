"""Cross-entropy of a linear head, computed in chunks of tokens so that the logits never exist as a whole.

X tokens, D model, V vocabulary, C tokens of a chunk.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_IMPOSSIBLE = -1e30


def linear_cross_entropy(
    x_XD: Float[Array, "X D"],
    kernel_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over tokens of the cross-entropy of ``softmax(x kernel)``; tokens with a negative target count nothing.

    Columns of the kernel from ``vocab_size`` on are padding, which has no probability.

    ``(1 - s) * -log p(target) + s * mean_v(-log p(v)) + z * log(Z)^2`` for label smoothing s and z-loss z. The product
    is in the dtype of ``x`` with float32 accumulation, the rest in float32.
    The gradient of a chunk is taken while its logits are at hand, so the backward pass computes none of them again.

    Returns:
      The sum to be minimised, and sums for reporting that carry no gradient: ``cross_entropy`` (without smoothing and
      z-loss), ``correct`` (tokens whose most probable token is the target) and ``tokens`` (targets that count).
    """
    sums: Any = _linear_cross_entropy(
        x_XD, kernel_DV, targets_X, label_smoothing, z_loss, vocab_size or kernel_DV.shape[1], chunk_size
    )
    return sums[0], {"cross_entropy": sums[1], "correct": sums[2], "tokens": sums[3]}


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _linear_cross_entropy(x_XD, kernel_DV, targets_X, label_smoothing, z_loss, vocab_size, chunk_size):
    sums, _, _ = _scan_chunks(
        x_XD, kernel_DV, targets_X, label_smoothing, z_loss, vocab_size, chunk_size, gradients=False
    )
    return sums


def _forward(x_XD, kernel_DV, targets_X, label_smoothing, z_loss, vocab_size, chunk_size):
    sums, dx_XD, dkernel_DV = _scan_chunks(
        x_XD, kernel_DV, targets_X, label_smoothing, z_loss, vocab_size, chunk_size, gradients=True
    )
    return sums, (dx_XD, dkernel_DV)


def _backward(label_smoothing, z_loss, vocab_size, chunk_size, residuals, cotangents):
    dx_XD, dkernel_DV = residuals
    g = cotangents[0]
    return (dx_XD * g.astype(dx_XD.dtype)), (dkernel_DV * g.astype(dkernel_DV.dtype)), None


_linear_cross_entropy.defvjp(_forward, _backward)


def _scan_chunks(x_XD, kernel_DV, targets_X, label_smoothing, z_loss, vocab_size, chunk_size, *, gradients: bool):
    X, D = x_XD.shape
    V = kernel_DV.shape[1]
    real_V = jnp.arange(V, dtype=jnp.int32) < vocab_size
    chunks = -(-X // chunk_size)
    C = -(-X // chunks)
    padding = chunks * C - X
    x_SCD = jnp.pad(x_XD, ((0, padding), (0, 0))).reshape(chunks, C, D)
    targets_SC = jnp.pad(targets_X, (0, padding), constant_values=-1).reshape(chunks, C)

    def step(carry, chunk):
        sums, dkernel_DV = carry
        x_CD, targets_C = chunk
        logits_CV = jnp.einsum("CD,DV->CV", x_CD, kernel_DV, preferred_element_type=jnp.float32)
        counts_C = (targets_C >= 0).astype(jnp.float32)
        target_CV = jnp.arange(V, dtype=targets_C.dtype)[None, :] == targets_C[:, None]
        if vocab_size < V:
            logits_CV = jnp.where(real_V[None, :], logits_CV, _IMPOSSIBLE)
        log_z_C = jax.nn.logsumexp(logits_CV, axis=-1)
        of_target_C = jnp.sum(jnp.where(target_CV, logits_CV, 0.0), axis=-1)
        nll_C = log_z_C - of_target_C
        loss_C = nll_C
        if label_smoothing:
            mean_C = jnp.sum(jnp.where(real_V[None, :], logits_CV, 0.0), axis=-1) / vocab_size
            loss_C = (1 - label_smoothing) * nll_C + label_smoothing * (log_z_C - mean_C)
        if z_loss:
            loss_C = loss_C + z_loss * jnp.square(log_z_C)
        others_C = jnp.max(jnp.where(target_CV, _IMPOSSIBLE, logits_CV), axis=-1)
        correct_C = (of_target_C > others_C).astype(jnp.float32)  # a tie is no hit
        new = jnp.stack(
            [jnp.sum(loss_C * counts_C), jnp.sum(nll_C * counts_C), jnp.sum(correct_C * counts_C), jnp.sum(counts_C)]
        )
        if not gradients:
            return (sums + new, dkernel_DV), None
        p_CV = jnp.exp(logits_CV - log_z_C[:, None])
        dlogits_CV = p_CV * (1 + 2 * z_loss * log_z_C[:, None]) - (1 - label_smoothing) * target_CV.astype(jnp.float32)
        if label_smoothing:
            dlogits_CV = dlogits_CV - jnp.where(real_V[None, :], label_smoothing / vocab_size, 0.0)
        dlogits_CV = (dlogits_CV * counts_C[:, None]).astype(x_CD.dtype)
        dx_CD = jnp.einsum("CV,DV->CD", dlogits_CV, kernel_DV)
        dkernel_DV = dkernel_DV + jnp.einsum("CD,CV->DV", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
        return (sums + new, dkernel_DV), dx_CD

    zero = jnp.zeros((D, V) if gradients else (), jnp.float32)
    with jax.named_scope("linear_cross_entropy"):
        (sums, dkernel_DV), dx_SCD = jax.lax.scan(step, (jnp.zeros(4, jnp.float32), zero), (x_SCD, targets_SC))
    if dx_SCD is None:
        return tuple(sums), None, None
    dx_XD = dx_SCD.reshape(chunks * C, D)[:X].astype(x_XD.dtype)
    return tuple(sums), dx_XD, dkernel_DV.astype(kernel_DV.dtype)

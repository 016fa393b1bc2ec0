"""Cross-entropy of a linear head, computed in chunks of tokens so that the logits never exist as a whole.

X tokens, D model, V vocabulary, C tokens of a chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_IMPOSSIBLE = -1e30


class Terms(NamedTuple):
    """What is minimised, and how: static.

    Attributes:
      label_smoothing: share of the target that is spread over all tokens.
      z_loss: weight of log(Z)^2.
      vocab_size: columns of the kernel that are tokens.
      chunk_size: most tokens whose logits exist at a time.
    """

    label_smoothing: float
    z_loss: float
    vocab_size: int
    chunk_size: int


def linear_cross_entropy(
    x_XD: Float[Array, "X D"],
    kernel_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    weights_X: Float[Array, " X"] | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over tokens of the cross-entropy of ``softmax(x kernel)``; tokens with a negative target count nothing.

    Where ``weights_X`` are given, a token counts as much as its weight says in all sums; no gradient reaches them.
    Columns of the kernel from ``vocab_size`` on are padding, which has no probability.

    ``(1 - s) * -log p(target) + s * mean_v(-log p(v)) + z * log(Z)^2`` for label smoothing s and z-loss z. The product
    is in the dtype of ``x`` with float32 accumulation, the rest in float32.
    The gradient of a chunk is taken while its logits are at hand, so the backward pass computes none of them again.

    Returns:
      The sum to be minimised, and sums for reporting that carry no gradient: ``cross_entropy`` (without smoothing and
      z-loss), ``correct`` (tokens whose most probable token is the target) and ``tokens`` (targets that count).
    """
    terms = Terms(label_smoothing, z_loss, vocab_size or kernel_DV.shape[1], chunk_size)
    return named_sums(_linear_cross_entropy(x_XD, kernel_DV, targets_X, weights_X, terms))


def token_losses(
    x_XD: Float[Array, "X D"],
    kernel_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    *,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
    vocab_axis: str | None = None,
) -> Float[Array, "2 X"]:
    """Of each token the cross-entropy, and 1 where its most probable token is the target; 0 where it has no target.

    Of what is summed by :func:`linear_cross_entropy`, without a gradient.
    """
    terms = Terms(0.0, 0.0, vocab_size or kernel_DV.shape[1], chunk_size)
    found_SC2 = _in_chunks(x_XD, kernel_DV, targets_X, terms, None, False, vocab_axis)[1]
    return jax.lax.stop_gradient(found_SC2.reshape(-1, 2)[: x_XD.shape[0]].T)


def named_sums(sums_4: Any) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The results of :func:`linear_cross_entropy` from the sums of :func:`cross_entropy_in_chunks`."""
    return sums_4[0], {"cross_entropy": sums_4[1], "correct": sums_4[2], "tokens": sums_4[3]}


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear_cross_entropy(x_XD, kernel_DV, targets_X, weights_X, terms):
    return cross_entropy_in_chunks(x_XD, kernel_DV, targets_X, terms, weights_X=weights_X, gradients=False)[0]


def _forward(x_XD, kernel_DV, targets_X, weights_X, terms):
    sums_4, dx_XD, dkernel_DV = cross_entropy_in_chunks(
        x_XD, kernel_DV, targets_X, terms, weights_X=weights_X, gradients=True
    )
    assert dx_XD is not None and dkernel_DV is not None
    return sums_4, (dx_XD, dkernel_DV.astype(kernel_DV.dtype))


def scaled_gradients(terms: Terms, residuals: tuple[Array, Array], slope_4: Array) -> tuple[Array, Array, None, None]:
    """The backward pass of a loss whose forward pass kept its gradients for tokens and kernel."""
    del terms
    dx, dkernel_DV = residuals
    return dx * slope_4[0].astype(dx.dtype), dkernel_DV * slope_4[0].astype(dkernel_DV.dtype), None, None


_linear_cross_entropy.defvjp(_forward, scaled_gradients)


def cross_entropy_in_chunks(
    x_XD: Float[Array, "X D"],
    kernel_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    terms: Terms,
    *,
    gradients: bool,
    weights_X: Float[Array, " X"] | None = None,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, "4"], Float[Array, "X D"] | None, Float[Array, "D V"] | None]:
    """The sums of :func:`linear_cross_entropy` (loss, cross-entropy, hits, targets), and gradients of the first.

    Args:
      x_XD: tokens.
      kernel_DV: the head, or its columns on this device.
      targets_X: of the whole vocabulary.
      terms: what is minimised.
      gradients: whether to make them.
      weights_X: how much each token counts; None: 1.
      vocab_axis: mesh axis that the columns are split over. Sums are those of all columns; the gradient of the tokens
        is that of the columns here, to be summed over the axis.

    Returns:
      The sums, and where asked for the gradients of tokens, in their dtype, and of the kernel, float32.
    """
    sums_4, dx_SCD, dkernel_DV = _in_chunks(x_XD, kernel_DV, targets_X, terms, weights_X, gradients, vocab_axis)
    if not gradients:
        return sums_4, None, None
    return sums_4, dx_SCD.reshape(-1, x_XD.shape[1])[: x_XD.shape[0]].astype(x_XD.dtype), dkernel_DV


def _in_chunks(
    x_XD: Array,
    kernel_DV: Array,
    targets_X: Array,
    terms: Terms,
    weights_X: Array | None,
    gradients: bool,
    vocab_axis: str | None,
) -> tuple[Array, Array, Array]:
    """Sums; with gradients those of tokens [S, C, D] and of the kernel, else losses and hits [S, C, 2] of tokens."""
    X, D = x_XD.shape
    V = kernel_DV.shape[1]
    first = jnp.zeros((), jnp.int32) if vocab_axis is None else V * jax.lax.axis_index(vocab_axis)
    columns_V = first + jnp.arange(V, dtype=jnp.int32)
    real_V = columns_V < terms.vocab_size
    padded = vocab_axis is not None or terms.vocab_size < V
    chunks = -(-X // terms.chunk_size)
    C = -(-X // chunks)
    padding = chunks * C - X
    x_SCD = jnp.pad(x_XD, ((0, padding), (0, 0))).reshape(chunks, C, D)
    targets_SC = jnp.pad(targets_X, (0, padding), constant_values=-1).reshape(chunks, C)
    weights_SC = None if weights_X is None else jnp.pad(weights_X, (0, padding)).reshape(chunks, C)

    def total(x: Array) -> Array:
        return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)

    def most(x: Array) -> Array:
        return x if vocab_axis is None else jax.lax.pmax(x, vocab_axis)

    def step(carry, chunk):
        sums_4, dkernel_DV = carry
        x_CD, targets_C, weights_C = chunk
        logits_CV = jnp.einsum("CD,DV->CV", x_CD, kernel_DV, preferred_element_type=jnp.float32)
        counts_C = (targets_C >= 0).astype(jnp.float32)
        if weights_C is not None:
            counts_C = counts_C * weights_C
        target_CV = columns_V[None, :] == targets_C[:, None]
        if padded:
            logits_CV = jnp.where(real_V[None, :], logits_CV, _IMPOSSIBLE)
        if vocab_axis is None:
            log_z_C = jax.nn.logsumexp(logits_CV, axis=-1)
        else:
            largest_C = most(jnp.max(logits_CV, axis=-1))
            log_z_C = largest_C + jnp.log(total(jnp.sum(jnp.exp(logits_CV - largest_C[:, None]), axis=-1)))
        of_target_C = total(jnp.sum(jnp.where(target_CV, logits_CV, 0.0), axis=-1))
        nll_C = log_z_C - of_target_C
        loss_C = nll_C
        if terms.label_smoothing:
            mean_C = total(jnp.sum(jnp.where(real_V[None, :], logits_CV, 0.0), axis=-1)) / terms.vocab_size
            loss_C = (1 - terms.label_smoothing) * nll_C + terms.label_smoothing * (log_z_C - mean_C)
        if terms.z_loss:
            loss_C = loss_C + terms.z_loss * jnp.square(log_z_C)
        others_C = most(jnp.max(jnp.where(target_CV, _IMPOSSIBLE, logits_CV), axis=-1))
        correct_C = (of_target_C > others_C).astype(jnp.float32)  # a tie is no hit
        new = jnp.stack(
            [jnp.sum(loss_C * counts_C), jnp.sum(nll_C * counts_C), jnp.sum(correct_C * counts_C), jnp.sum(counts_C)]
        )
        if not gradients:
            return (sums_4 + new, dkernel_DV), jnp.stack([nll_C * counts_C, correct_C * counts_C], axis=-1)
        p_CV = jnp.exp(logits_CV - log_z_C[:, None])
        one_hot_CV = target_CV.astype(jnp.float32)
        dlogits_CV = p_CV * (1 + 2 * terms.z_loss * log_z_C[:, None]) - (1 - terms.label_smoothing) * one_hot_CV
        if terms.label_smoothing:
            dlogits_CV = dlogits_CV - jnp.where(real_V[None, :], terms.label_smoothing / terms.vocab_size, 0.0)
        dlogits_CV = (dlogits_CV * counts_C[:, None]).astype(x_CD.dtype)
        dx_CD = jnp.einsum("CV,DV->CD", dlogits_CV, kernel_DV)
        dkernel_DV = dkernel_DV + jnp.einsum("CD,CV->DV", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
        return (sums_4 + new, dkernel_DV), dx_CD

    zero = jnp.zeros((D, V) if gradients else (), jnp.float32)
    with jax.named_scope("linear_cross_entropy"):
        (sums_4, dkernel_DV), found = jax.lax.scan(
            step, (jnp.zeros(4, jnp.float32), zero), (x_SCD, targets_SC, weights_SC)
        )
    return sums_4, found, dkernel_DV

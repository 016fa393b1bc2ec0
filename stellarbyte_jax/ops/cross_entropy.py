"""Cross-entropy of a linear head, computed in chunks of tokens so that the logits never exist as a whole.

X tokens, D model, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.dispatch import dispatch

_IMPOSSIBLE = -1e30


class Terms(NamedTuple):
    """What is minimised, and how: static.

    Attributes:
      label_smoothing: share of the target that is spread over all tokens.
      z_loss: weight of log(Z)^2.
      vocab_size: columns of the kernel that are tokens.
      chunk_size: most tokens whose logits exist at a time.
      implementation: ``"xla"``, ``"pallas"`` or ``"auto"``, see :func:`linear_cross_entropy`.
    """

    label_smoothing: float
    z_loss: float
    vocab_size: int
    chunk_size: int
    implementation: str = "auto"


class Read(NamedTuple):
    """What is read of the logits of a chunk, of all columns of the vocabulary.

    Attributes:
      target_C: the target's; anything where there is none.
      others_C: the largest one of the others.
      log_z_C: log of the sum of exponentials.
      mean_C: their mean over words; None where nobody asks.
      probabilities: makes those of the columns here.
    """

    target_C: Array
    others_C: Array
    log_z_C: Array
    mean_C: Array | None
    probabilities: Callable[[], Array]


class Columns(NamedTuple):
    """The columns of the head that are here.

    Attributes:
      first: number of the first one.
      numbers_V: of all of them.
      real_V: whether they are words.
      padded: whether some may be none.
      axis: mesh axis that the vocabulary is split over; None for none.
    """

    first: Array
    numbers_V: Array
    real_V: Array
    padded: bool
    axis: str | None

    def total(self, x: Array) -> Array:
        """The sum over all devices that have columns."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def most(self, x: Array) -> Array:
        """The largest on any of them."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)


class Gradients(NamedTuple):
    """Of the sum that is minimised.

    Attributes:
      x: of tokens, in their dtype.
      kernel: float32; None where it is not trained, and is not computed.
      low: of the pair of arrays of an adapter, float32; None: it has none.
    """

    x: Any
    kernel: Any
    low: Any


# The inner channels of an adapter of the head [..., R] and the matrix behind them [R, V]: their product is added to
# the logits.
Low = tuple[Float[Array, "X R"], Float[Array, "R V"]]


def linear_cross_entropy(
    x_XD: Float[Array, "X D"],
    kernel_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    weights_X: Float[Array, " X"] | None = None,
    *,
    low: Low | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
    implementation: str = "auto",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over tokens of the cross-entropy of ``softmax(x kernel)``; tokens with a negative target count nothing.

    Where ``weights_X`` are given, a token counts as much as its weight says in all sums; no gradient reaches them.
    Columns of the kernel from ``vocab_size`` on are padding, which has no probability. With ``low``, a pair ``(h, b)``,
    logits are ``x kernel + h b``.

    ``(1 - s) * -log p(target) + s * mean_v(-log p(v)) + z * log(Z)^2`` for label smoothing s and z-loss z. The product
    is in the dtype of ``x`` with float32 accumulation, the rest in float32.
    The gradient of a chunk is taken while its logits are at hand, so the backward pass computes none of them again.
    That of a kernel which nothing is differentiated by is not computed.

    With ``implementation="pallas"`` a kernel for Hopper GPUs makes the logits and reads them as it makes them. They are
    kept in the dtype of ``x``, less the largest of the 128 around, so that a probability is off by less than 0.1 % of
    the largest of these; the loss is not. ``"auto"`` is ``"xla"``, and so is a loss without gradients.

    Raises:
      NotImplementedError: the kernel does not take the arrays or the device; says why.

    Returns:
      The sum to be minimised, and sums for reporting that carry no gradient: ``cross_entropy`` (without smoothing and
      z-loss), ``correct`` (tokens whose most probable token is the target) and ``tokens`` (targets that count).
    """
    terms = Terms(label_smoothing, z_loss, vocab_size or kernel_DV.shape[1], chunk_size, implementation)
    return named_sums(_linear_cross_entropy(x_XD, kernel_DV, low, targets_X, weights_X, terms))


def token_losses(
    x_XD: Float[Array, "X D"],
    kernel_DV: Float[Array, "D V"],
    targets_X: Int[Array, " X"],
    *,
    low: Low | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
    vocab_axis: str | None = None,
) -> Float[Array, "2 X"]:
    """Of each token the cross-entropy, and 1 where its most probable token is the target; 0 where it has no target.

    Of what is summed by :func:`linear_cross_entropy`, without a gradient.
    """
    terms = Terms(0.0, 0.0, vocab_size or kernel_DV.shape[1], chunk_size)
    found_SC2 = _in_chunks((x_XD, kernel_DV, low), targets_X, terms, None, None, vocab_axis)[1]
    return jax.lax.stop_gradient(found_SC2.reshape(-1, 2)[: x_XD.shape[0]].T)


def named_sums(sums_4: Any) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The results of :func:`linear_cross_entropy` from the sums of :func:`cross_entropy_in_chunks`."""
    return sums_4[0], {"cross_entropy": sums_4[1], "correct": sums_4[2], "tokens": sums_4[3]}


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _linear_cross_entropy(x_XD, kernel_DV, low, targets_X, weights_X, terms):
    return cross_entropy_in_chunks((x_XD, kernel_DV, low), targets_X, terms, weights_X=weights_X)[0]


def _forward(x_XD, kernel_DV, low, targets_X, weights_X, terms):
    (product, targets_X, weights_X), wanted = given_values((x_XD, kernel_DV, low), targets_X, weights_X)
    sums_4, gradients = cross_entropy_in_chunks(product, targets_X, terms, weights_X=weights_X, wanted=wanted)
    assert gradients is not None
    return sums_4, in_dtypes_of(product, gradients)


def in_dtypes_of(product: Any, gradients: Gradients) -> Gradients:
    """The gradients in the dtypes of what they are of."""
    _, kernel, low = product
    return gradients._replace(
        kernel=None if gradients.kernel is None else gradients.kernel.astype(kernel.dtype),
        low=None if low is None else jax.tree.map(lambda d, like: d.astype(like.dtype), tuple(gradients.low), low),
    )


def given_values(product: Any, targets: Any, weights: Any) -> tuple[Any, Gradients]:
    """What a rule of differentiation with symbolic zeros is given, as arrays, and which gradients are asked for."""

    def is_given(x: Any) -> bool:
        return isinstance(x, CustomVJPPrimal)

    values = jax.tree.map(lambda x: x.value, (product, targets, weights), is_leaf=is_given)
    return values, Gradients(True, product[1].perturbed, product[2] is not None)


def scaled_gradients(terms: Terms, gradients: Gradients, slope_4: Any) -> tuple[Any, ...]:
    """The backward pass of a loss whose forward pass kept its gradients."""
    del terms
    slope = jnp.zeros(()) if isinstance(slope_4, SymbolicZero) else slope_4[0]
    return *jax.tree.map(lambda x: x * slope.astype(x.dtype), gradients), None, None


_linear_cross_entropy.defvjp(_forward, scaled_gradients, symbolic_zeros=True)

Product = tuple[Float[Array, "X D"], Float[Array, "D V"], Low | None]  # what makes the logits


def cross_entropy_in_chunks(
    product: Product,
    targets_X: Int[Array, " X"],
    terms: Terms,
    *,
    wanted: Gradients | None = None,
    weights_X: Float[Array, " X"] | None = None,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, "4"], Gradients | None]:
    """The sums of :func:`linear_cross_entropy` (loss, cross-entropy, hits, targets), and gradients of the first.

    Args:
      product: tokens, the head, or its columns on this device, and the adapter of these columns.
      targets_X: of the whole vocabulary.
      terms: what is minimised.
      wanted: which gradients to make; None: none.
      weights_X: how much each token counts; None: 1.
      vocab_axis: mesh axis that the columns are split over. Sums are those of all columns; the gradient of the tokens
        is that of the columns here, to be summed over the axis.

    Returns:
      The sums, and the gradients that are asked for: of tokens and inner channels in their dtypes, of matrices
      float32.
    """
    x_XD, _, low = product
    sums_4, found, totals = _in_chunks(product, targets_X, terms, weights_X, wanted, vocab_axis)
    if wanted is None:
        return sums_4, None

    def of_tokens(d_SC: Array, like: Array) -> Array:
        return d_SC.reshape(-1, like.shape[1])[: like.shape[0]].astype(like.dtype)

    dx_SCD, dh_SCR = found
    dkernel_DV, db_RV = totals
    return sums_4, Gradients(
        of_tokens(dx_SCD, x_XD),
        dkernel_DV,
        None if low is None else (of_tokens(dh_SCR, low[0]), db_RV),
    )


def _in_chunks(
    product: Product,
    targets_X: Array,
    terms: Terms,
    weights_X: Array | None,
    wanted: Gradients | None,
    vocab_axis: str | None,
) -> tuple[Array, Any, Any]:
    """Sums; with gradients those of tokens and inner channels [S, C, ...], else losses and hits [S, C, 2] of tokens.

    And sums of the gradients of the matrices.
    """
    x_XD, kernel_DV, low = product
    X = x_XD.shape[0]
    V = kernel_DV.shape[1]
    first = jnp.zeros((), jnp.int32) if vocab_axis is None else V * jax.lax.axis_index(vocab_axis)
    numbers_V = first + jnp.arange(V, dtype=jnp.int32)
    padded = vocab_axis is not None or terms.vocab_size < V
    columns = Columns(first, numbers_V, numbers_V < terms.vocab_size, padded, vocab_axis)
    by_kernel = terms.implementation == "pallas" and wanted is not None
    implementation = "xla" if wanted is None else terms.implementation
    chunks = -(-X // terms.chunk_size)
    C = -(-X // chunks)
    C = max(-(-C // 8) * 8, 64) if by_kernel else C

    def cut(x: Array | None, filling: int = 0) -> Array | None:
        if x is None:
            return None
        rest = x.shape[1:]
        padding = ((0, chunks * C - X), *((0, 0) for _ in rest))
        return jnp.pad(x, padding, constant_values=filling).reshape(chunks, C, *rest)

    def step(carry, chunk):
        sums_4, (dkernel_DV, db_RV) = carry
        x_CD, h_CR, targets_C, weights_C = chunk
        given = (x_CD, kernel_DV, None if low is None else (h_CR, low[1])), targets_C, terms, columns
        ways = {"xla": _read, "pallas": _read_by_kernel}
        found = dispatch("loss.implementation", implementation, ways, *given)
        of_target_C, others_C, log_z_C, mean_C, probabilities = found
        counts_C = (targets_C >= 0).astype(jnp.float32)
        if weights_C is not None:
            counts_C = counts_C * weights_C
        nll_C = log_z_C - of_target_C
        loss_C = nll_C
        if mean_C is not None:
            loss_C = (1 - terms.label_smoothing) * nll_C + terms.label_smoothing * (log_z_C - mean_C)
        if terms.z_loss:
            loss_C = loss_C + terms.z_loss * jnp.square(log_z_C)
        correct_C = (of_target_C > others_C).astype(jnp.float32)  # a tie is no hit
        new = jnp.stack(
            [jnp.sum(loss_C * counts_C), jnp.sum(nll_C * counts_C), jnp.sum(correct_C * counts_C), jnp.sum(counts_C)]
        )
        if wanted is None:
            return (sums_4 + new, carry[1]), jnp.stack([nll_C * counts_C, correct_C * counts_C], axis=-1)
        one_hot_CV = (columns.numbers_V[None, :] == targets_C[:, None]).astype(jnp.float32)
        dlogits_CV = (
            probabilities() * (1 + 2 * terms.z_loss * log_z_C[:, None]) - (1 - terms.label_smoothing) * one_hot_CV
        )
        if terms.label_smoothing:
            dlogits_CV = dlogits_CV - jnp.where(columns.real_V[None, :], terms.label_smoothing / terms.vocab_size, 0.0)
        dlogits_CV = (dlogits_CV * counts_C[:, None]).astype(x_CD.dtype)
        dx_CD, dh_CR = jnp.einsum("CV,DV->CD", dlogits_CV, kernel_DV), None
        if wanted.kernel:
            dkernel_DV += jnp.einsum("CD,CV->DV", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
        if low is not None:
            dh_CR = jnp.einsum("CV,RV->CR", dlogits_CV, low[1])
            db_RV += jnp.einsum("CR,CV->RV", h_CR, dlogits_CV, preferred_element_type=jnp.float32)
        return (sums_4 + new, (dkernel_DV, db_RV)), (dx_CD, dh_CR)

    zeros = (
        jnp.zeros(kernel_DV.shape, jnp.float32) if wanted is not None and wanted.kernel else None,
        jnp.zeros(low[1].shape, jnp.float32) if wanted is not None and low is not None else None,
    )
    with jax.named_scope("linear_cross_entropy"):
        (sums_4, totals), found = jax.lax.scan(
            step,
            (jnp.zeros(4, jnp.float32), zeros),
            (cut(x_XD), cut(None if low is None else low[0]), cut(targets_X, -1), cut(weights_X)),
        )
    return sums_4, found, totals


def _read(product: Product, targets_C: Array, terms: Terms, columns: Columns) -> Read:
    """Logits in float32, as XLA computes them."""
    x_CD, kernel_DV, low = product
    logits_CV = jnp.einsum("CD,DV->CV", x_CD, kernel_DV, preferred_element_type=jnp.float32)
    if low is not None:
        logits_CV = logits_CV + jnp.einsum("CR,RV->CV", *low, preferred_element_type=jnp.float32)
    target_CV = columns.numbers_V[None, :] == targets_C[:, None]
    if columns.padded:
        logits_CV = jnp.where(columns.real_V[None, :], logits_CV, _IMPOSSIBLE)
    of_target_C = columns.total(jnp.sum(jnp.where(target_CV, logits_CV, 0.0), axis=-1))
    others_C = columns.most(jnp.max(jnp.where(target_CV, _IMPOSSIBLE, logits_CV), axis=-1))
    largest_C = _largest(of_target_C, others_C, targets_C)
    log_z_C = largest_C + jnp.log(columns.total(jnp.sum(jnp.exp(logits_CV - largest_C[:, None]), axis=-1)))
    mean_C = None
    if terms.label_smoothing:
        mean_C = columns.total(jnp.sum(jnp.where(columns.real_V[None, :], logits_CV, 0.0), axis=-1)) / terms.vocab_size
    return Read(of_target_C, others_C, log_z_C, mean_C, lambda: jnp.exp(logits_CV - log_z_C[:, None]))


def _read_by_kernel(product: Product, targets_C: Array, terms: Terms, columns: Columns) -> Read:
    """As :func:`_read`, with logits that are kept tile by tile, less the largest of each."""
    # Not at the top: kernels need parts of jax that other ways do without.
    from stellarbyte_jax.ops.pallas.logits import TILE, logits

    x_CD, kernel_DV, low = product
    if low is not None:
        raise NotImplementedError("the head has an adapter")
    V = kernel_DV.shape[1]
    words = jnp.clip(terms.vocab_size - columns.first, 0, V) if columns.padded else V
    own_C = jnp.where(targets_C < 0, -1, targets_C - columns.first)
    below_CV, others_TC, target_TC, sums_TC = logits(x_CD, kernel_DV, own_C, words)
    tile_C = jnp.where(own_C >= 0, own_C // TILE, -1)
    is_here_TC = jnp.arange(V // TILE, dtype=jnp.int32)[:, None] == tile_C[None, :]
    tops_TC = jnp.where(is_here_TC, jnp.maximum(others_TC, target_TC), others_TC)
    of_target_C = columns.total(jnp.sum(target_TC, axis=0))
    others_C = columns.most(jnp.max(others_TC, axis=0))
    largest_C = _largest(of_target_C, others_C, targets_C)
    log_z_C = largest_C + jnp.log(columns.total(jnp.sum(sums_TC * jnp.exp(tops_TC - largest_C[None]), axis=0)))

    def of_all(offset_TC: Array) -> Array:
        below_CTW = below_CV.astype(jnp.float32).reshape(-1, V // TILE, TILE)
        return (below_CTW + offset_TC.T[:, :, None]).reshape(below_CV.shape)

    mean_C = None
    if terms.label_smoothing:
        whole_CV = jnp.where(columns.real_V[None, :], of_all(tops_TC), 0.0)
        mean_C = columns.total(jnp.sum(whole_CV, axis=-1)) / terms.vocab_size
    return Read(of_target_C, others_C, log_z_C, mean_C, lambda: jnp.exp(of_all(tops_TC - log_z_C[None])))


def _largest(of_target_C: Array, others_C: Array, targets_C: Array) -> Array:
    """The largest of all logits, without another reading of them."""
    return jnp.where(targets_C >= 0, jnp.maximum(of_target_C, others_C), others_C)

"""The product of rows with the matrix of their group.

S rows, E groups (experts), G blocks of rows, M rows of a block, D inputs, F outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.dispatch import dispatch


class Groups(NamedTuple):
    """Which rows belong to which group. Groups follow each other, each as a whole number of blocks.

    Attributes:
      sizes_E: int32, rows of each group, with the empty ones that fill its last block.
      experts_G: int32, the group of each of the equal blocks that the rows are cut into. None: as many blocks as
        groups, one for each.
    """

    sizes_E: Array
    experts_G: Array | None


class Unaligned(NamedTuple):
    """Groups of rows that follow each other without empty rows, and may begin anywhere.

    Attributes:
      sizes_E: int32, rows of each group; those behind the last one belong to none.
    """

    sizes_E: Array


def grouped_matmul(
    x_SD: Float[Array, "S D"],
    w_EDF: Float[Array, "E D F"],
    groups: Groups | Unaligned,
    *,
    implementation: str = "auto",
) -> Float[Array, "S F"]:
    """Each row times the matrix of its group, in the dtype of ``x``, summed in float32; zeros for rows of no group.

    Empty rows that fill blocks must be zero, and so must be their cotangents: they add nothing to the gradient of a
    matrix then. The same holds of rows behind the last group but for the kernels, which do not read them. Where rows of
    a group are infinite, the kernels may make gradients NaN of the matrices of the groups beside it too.

    Args:
      x_SD: rows in the order of groups.
      w_EDF: matrices.
      groups: of the rows.
      implementation: ``"xla"``; ``"pallas"``: kernels for Hopper GPUs; ``"auto"``: XLA here, since a layer chooses
        for all of its operations. Where groups are unaligned, XLA computes every row with every matrix.

    Raises:
      NotImplementedError: the kernels do not support the arrays or the device.
      ValueError: there is no such implementation, or the rows are not a whole number of blocks.
    """
    return dispatch("grouped_matmul", implementation, _PRODUCTS, x_SD, w_EDF, groups)


def grouped_matmul_dx(
    dy_SF: Float[Array, "S F"],
    w_EDF: Float[Array, "E D F"],
    groups: Groups | Unaligned,
    *,
    implementation: str = "auto",
) -> Float[Array, "S D"]:
    """The gradient of the rows of :func:`grouped_matmul`: each cotangent times the transposed matrix of its group."""
    return dispatch("grouped_matmul_dx", implementation, _GRADIENTS_OF_ROWS, dy_SF, w_EDF, groups)


def grouped_matmul_dw(
    x_SD: Float[Array, "S D"],
    dy_SF: Float[Array, "S F"],
    groups: Groups | Unaligned,
    *,
    implementation: str = "auto",
) -> Float[Array, "E D F"]:
    """The gradient of the matrices of :func:`grouped_matmul`: rows^T cotangents of a group, in the dtype of ``x``."""
    return dispatch("grouped_matmul_dw", implementation, _GRADIENTS_OF_MATRICES, x_SD, dy_SF, groups)


def kernels_refusal(x_SD: Array | jax.ShapeDtypeStruct, w_EDF: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the implementation ``"pallas"`` does not compute the product of such arrays; None where it does."""
    from stellarbyte_jax.ops.pallas.grouped_matmul import refusal

    return refusal(x_SD, w_EDF)


def scale_by_group(x_SF: Float[Array, "S F"], factors_EF: Float[Array, "E F"], groups: Groups) -> Float[Array, "S F"]:
    """Each row times the float32 factors of its group, in the dtype of ``x``; groups as in :func:`grouped_matmul`."""
    factors_GF = factors_EF
    if groups.experts_G is not None:  # as a product, for its gradient's sake: see below
        of_expert_GE = jax.nn.one_hot(groups.experts_G, factors_EF.shape[0], dtype=factors_EF.dtype)
        factors_GF = jnp.einsum("ge,ef->gf", of_expert_GE, factors_EF, precision=jax.lax.Precision.HIGHEST)
    x_GMF = x_SF.reshape(factors_GF.shape[0], -1, x_SF.shape[1])
    return (x_GMF * factors_GF[:, None].astype(x_SF.dtype)).reshape(x_SF.shape)


def _xla(x_SD: Array, w_EDF: Array, groups: Groups | Unaligned) -> Array:
    """A batched product over blocks, with the matrix of each block gathered.

    Of the ways that XLA offers this is the fastest on an H100 by far, whatever the balance: ``lax.ragged_dot`` computes
    every row with every matrix, and a loop over blocks costs more than a tenth of a millisecond a turn.
    """
    if isinstance(groups, Unaligned):
        y_SF = jax.lax.ragged_dot(x_SD, w_EDF, groups.sizes_E, preferred_element_type=jnp.float32)
        return y_SF.astype(x_SD.dtype)
    y_GMF = _blocked(_in_blocks(x_SD, groups), w_EDF, groups.experts_G)
    return y_GMF.reshape(x_SD.shape[0], -1)


def _xla_dx(dy_SF: Array, w_EDF: Array, groups: Groups | Unaligned) -> Array:
    if isinstance(groups, Unaligned):
        return _xla(dy_SF, w_EDF.swapaxes(1, 2), groups)
    dx_GMD = jnp.einsum("gmf,gdf->gmd", _in_blocks(dy_SF, groups), _of_blocks(w_EDF, groups.experts_G))
    return dx_GMD.reshape(dy_SF.shape[0], -1)


def _xla_dw(x_SD: Array, dy_SF: Array, groups: Groups | Unaligned) -> Array:
    if isinstance(groups, Unaligned):
        w_EDF = jax.ShapeDtypeStruct((groups.sizes_E.shape[0], x_SD.shape[1], dy_SF.shape[1]), x_SD.dtype)
        (dw_EDF,) = jax.linear_transpose(lambda w: _xla(x_SD, w, groups), w_EDF)(dy_SF)
        return dw_EDF
    return _dw_of_blocks(_in_blocks(x_SD, groups), _in_blocks(dy_SF, groups), groups.experts_G, groups.sizes_E.shape[0])


def _in_blocks(x_SD: Array, groups: Groups) -> Array:
    blocks = groups.sizes_E.shape[0] if groups.experts_G is None else groups.experts_G.shape[0]
    if x_SD.shape[0] % blocks:
        raise ValueError(f"{x_SD.shape[0]} rows are not {blocks} equal blocks")
    return x_SD.reshape(blocks, -1, x_SD.shape[1])


def _pallas(x_SD: Array, w_EDF: Array, groups: Groups | Unaligned) -> Array:
    # Not at the top: the kernels' language is slow to import, and on another platform it may be missing.
    from stellarbyte_jax.ops.pallas.grouped_matmul import grouped_matmul as kernels

    return kernels(x_SD, w_EDF, groups.sizes_E)


def _pallas_dx(dy_SF: Array, w_EDF: Array, groups: Groups | Unaligned) -> Array:
    from stellarbyte_jax.ops.pallas.grouped_matmul import gradient_of_rows

    return gradient_of_rows(dy_SF, w_EDF, groups.sizes_E)


def _pallas_dw(x_SD: Array, dy_SF: Array, groups: Groups | Unaligned) -> Array:
    from stellarbyte_jax.ops.pallas.grouped_matmul import gradient_of_matrices

    return gradient_of_matrices(x_SD, dy_SF, groups.sizes_E)


@jax.custom_vjp
def _blocked(x_GMD: Array, w_EDF: Array, experts_G: Array | None) -> Array:
    return jnp.einsum("gmd,gdf->gmf", x_GMD, _of_blocks(w_EDF, experts_G))


def _of_blocks(w_EDF: Array, experts_G: Array | None) -> Array:
    return w_EDF if experts_G is None else w_EDF[experts_G]


def _forward(x_GMD: Array, w_EDF: Array, experts_G: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _blocked(x_GMD, w_EDF, experts_G), (x_GMD, w_EDF, experts_G)


def _backward(kept: tuple[Array, Array, Array | None], dy_GMF: Array) -> tuple[Array, Array, None]:
    # The gathered matrices are gathered again: kept, they would take more memory than all weights. Where layers are no
    # loop and are not computed again, XLA sees that both gathers are the same, and keeps them for the sake of speed.
    x_GMD, w_EDF, experts_G = kept
    dx_GMD = jnp.einsum("gmf,gdf->gmd", dy_GMF, _of_blocks(w_EDF, experts_G))
    return dx_GMD, _dw_of_blocks(x_GMD, dy_GMF, experts_G, w_EDF.shape[0]).astype(w_EDF.dtype), None


def _dw_of_blocks(x_GMD: Array, dy_GMF: Array, experts_G: Array | None, experts: int) -> Array:
    dw_GDF = jnp.einsum("gmd,gmf->gdf", x_GMD, dy_GMF)
    if experts_G is None:
        return dw_GDF
    # Sums of blocks as a product: on a GPU faster than a scatter, which takes minutes to compile for many blocks.
    of_expert_GE = jax.nn.one_hot(experts_G, experts, dtype=dw_GDF.dtype)
    dw_EDF = jnp.einsum("ge,gdf->edf", of_expert_GE, dw_GDF, precision=jax.lax.Precision.HIGHEST)
    return dw_EDF.astype(x_GMD.dtype)


_blocked.defvjp(_forward, _backward)
_PRODUCTS = {"xla": _xla, "pallas": _pallas}
_GRADIENTS_OF_ROWS = {"xla": _xla_dx, "pallas": _pallas_dx}
_GRADIENTS_OF_MATRICES = {"xla": _xla_dw, "pallas": _pallas_dw}

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


def grouped_matmul(
    x_SD: Float[Array, "S D"], w_EDF: Float[Array, "E D F"], groups: Groups, *, implementation: str = "auto"
) -> Float[Array, "S F"]:
    """Each row times the matrix of its group, in the dtype of ``x``, summed in float32.

    Rows behind the last group, and those that fill blocks, must be zero, and so must be their cotangents: they add
    nothing to the gradient of a matrix then.

    Args:
      x_SD: rows in the order of groups.
      w_EDF: matrices.
      groups: of the rows.
      implementation: ``"auto"``, ``"xla"``, or ``"pallas"``: kernels for Hopper GPUs.

    Raises:
      NotImplementedError: the kernels do not support the arrays or the device.
      ValueError: there is no such implementation, or the rows are not a whole number of blocks.
    """
    return dispatch("grouped_matmul", implementation, _IMPLEMENTATIONS, x_SD, w_EDF, groups)


def scale_by_group(x_SF: Float[Array, "S F"], factors_EF: Float[Array, "E F"], groups: Groups) -> Float[Array, "S F"]:
    """Each row times the float32 factors of its group, in the dtype of ``x``; groups as in :func:`grouped_matmul`."""
    factors_GF = factors_EF
    if groups.experts_G is not None:  # as a product, for its gradient's sake: see below
        of_expert_GE = jax.nn.one_hot(groups.experts_G, factors_EF.shape[0], dtype=factors_EF.dtype)
        factors_GF = jnp.einsum("ge,ef->gf", of_expert_GE, factors_EF, precision=jax.lax.Precision.HIGHEST)
    x_GMF = x_SF.reshape(factors_GF.shape[0], -1, x_SF.shape[1])
    return (x_GMF * factors_GF[:, None].astype(x_SF.dtype)).reshape(x_SF.shape)


def _xla(x_SD: Array, w_EDF: Array, groups: Groups) -> Array:
    """A batched product over blocks, with the matrix of each block gathered.

    Of the ways that XLA offers this is the fastest on an H100 by far, whatever the balance: ``lax.ragged_dot`` computes
    every row with every matrix, and a loop over blocks costs more than a tenth of a millisecond a turn.
    """
    blocks = w_EDF.shape[0] if groups.experts_G is None else groups.experts_G.shape[0]
    if x_SD.shape[0] % blocks:
        raise ValueError(f"{x_SD.shape[0]} rows are not {blocks} equal blocks")
    y_GMF = _blocked(x_SD.reshape(blocks, -1, x_SD.shape[1]), w_EDF, groups.experts_G)
    return y_GMF.reshape(x_SD.shape[0], -1)


def _pallas(x_SD: Array, w_EDF: Array, groups: Groups) -> Array:
    # Not at the top: the kernels' language is slow to import, and on another platform it may be missing.
    from stellarbyte_jax.ops.pallas.grouped_matmul import grouped_matmul as kernels

    return kernels(x_SD, w_EDF, groups.sizes_E)


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
    dw_GDF = jnp.einsum("gmd,gmf->gdf", x_GMD, dy_GMF)
    if experts_G is None:
        return dx_GMD, dw_GDF, None
    # Sums of blocks as a product: on a GPU faster than a scatter, which takes minutes to compile for many blocks.
    of_expert_GE = jax.nn.one_hot(experts_G, w_EDF.shape[0], dtype=dw_GDF.dtype)
    dw_EDF = jnp.einsum("ge,gdf->edf", of_expert_GE, dw_GDF, precision=jax.lax.Precision.HIGHEST)
    return dx_GMD, dw_EDF.astype(w_EDF.dtype), None


_blocked.defvjp(_forward, _backward)
_IMPLEMENTATIONS = {"xla": _xla, "pallas": _pallas}

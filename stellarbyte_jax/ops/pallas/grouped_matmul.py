"""The grouped matrix product and its gradients as kernels for Hopper GPUs.

S rows, E groups, D inputs, F outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.group_tiles import HALF, RowTiles, row_tiles
from stellarbyte_jax.ops.pallas.grouped_rows import Tuning, grouped_rows
from stellarbyte_jax.ops.pallas.grouped_weights import grouped_weights

_TUNINGS = {  # by kernel, then by columns of the result: the first line that has as many
    "forward": {129: Tuning(256, 4), 0: Tuning(128, 6)},
    "dx": {129: Tuning(256, 4), 0: Tuning(128, 6)},
    "dw": {129: Tuning(256, 4), 0: Tuning(128, 6)},
}


def grouped_matmul(
    x_SD: Float[Array, "S D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "S F"]:
    """Each row times the matrix of its group, summed in float32; zeros for the rows behind the last group.

    Groups may begin and end at any row and may be empty. Sums are taken in the same order whatever the other groups:
    the same rows give the same bits. Nothing is read of rows that belong to no group.

    Args:
      x_SD: rows in the order of groups; bfloat16 or float16.
      w_EDF: matrices, of the same dtype.
      sizes_E: rows of each group, at most S in all.

    Raises:
      NotImplementedError: the device or the arrays are not what the kernels are made for; says why.
    """
    if (reason := refusal(x_SD, w_EDF)) is not None:
        raise NotImplementedError(reason)
    return _product(x_SD, w_EDF, row_tiles(sizes_E, x_SD.shape[0]), sizes_E)


def gradient_of_rows(
    dy_SF: Float[Array, "S F"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "S D"]:
    """Each row times the transposed matrix of its group; for the rest see :func:`grouped_matmul`."""
    E, D, F = w_EDF.shape
    if (reason := refusal(dy_SF, jax.ShapeDtypeStruct((E, F, D), w_EDF.dtype))) is not None:
        raise NotImplementedError(reason)
    tiles = row_tiles(sizes_E, dy_SF.shape[0])
    return grouped_rows(dy_SF, w_EDF, tiles, transpose=True, tuning=tuning("dx", D))


def gradient_of_matrices(
    x_SD: Float[Array, "S D"], dy_SF: Float[Array, "S F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """``x^T dy`` over the rows of each group, in their dtype; for the rest see :func:`grouped_matmul`.

    Rows are added 64 at a time from a multiple of 8 on, so that the last bits depend on where a group begins too.
    """
    F = dy_SF.shape[1]
    w = jax.ShapeDtypeStruct((sizes_E.shape[0], x_SD.shape[1], F), dy_SF.dtype)
    if (reason := refusal(x_SD, w)) is not None:
        raise NotImplementedError(reason)
    return grouped_weights(x_SD, dy_SF, sizes_E, x_SD.dtype, tuning=tuning("dw", F))


def refusal(x_SD: Array | jax.ShapeDtypeStruct, w_EDF: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernels do not compute the product of these; None where they do."""
    (S, D), F = x_SD.shape, w_EDF.shape[2]
    if x_SD.dtype != w_EDF.dtype or x_SD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"both factors must be bfloat16 or both float16, not {x_SD.dtype} and {w_EDF.dtype}"
    if S < HALF:
        return f"there must be at least {HALF} rows, not {S}"
    if S % 8:
        return f"rows must be a multiple of 8, not {S}"
    if D % 64 or F % 64 or not D or not F:
        return f"inputs and outputs must be multiples of 64, not {D} and {F}"
    if not compat.runs_here():
        return "the kernels need an NVIDIA Hopper GPU (compute capability 9.0)"
    return None


def tuning(kernel: str, columns: int) -> Tuning:
    """How a kernel ("forward", "dx" or "dw") cuts a result of so many columns."""
    return next(tuning for least, tuning in _TUNINGS[kernel].items() if columns >= least)


@jax.custom_vjp
def _product(x_SD: Array, w_EDF: Array, tiles: RowTiles, sizes_E: Array) -> Array:
    del sizes_E
    return grouped_rows(x_SD, w_EDF, tiles, transpose=False, tuning=tuning("forward", w_EDF.shape[2]))


def _forward(x_SD: Array, w_EDF: Array, tiles: RowTiles, sizes_E: Array) -> tuple[Array, Any]:
    return _product(x_SD, w_EDF, tiles, sizes_E), (x_SD, w_EDF, tiles, sizes_E)


def _backward(kept: Any, dy_SF: Array) -> tuple[Array, Array, None, None]:
    x_SD, w_EDF, tiles, sizes_E = kept
    _, D, F = w_EDF.shape
    dx_SD = grouped_rows(dy_SF, w_EDF, tiles, transpose=True, tuning=tuning("dx", D))
    dw_EDF = grouped_weights(x_SD, dy_SF, sizes_E, w_EDF.dtype, tuning=tuning("dw", F))
    return dx_SD, dw_EDF, None, None


_product.defvjp(_forward, _backward)

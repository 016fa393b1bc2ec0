"""The grouped matrix product and its gradients as kernels for Hopper GPUs.

S rows, E groups, D inputs, F outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.group_tiles import HALF
from stellarbyte_jax.ops.pallas.grouped_rows import Tuning, grouped_rows
from stellarbyte_jax.ops.pallas.grouped_weights import grouped_weights


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
    return _product(x_SD, w_EDF, sizes_E)


def gradient_of_rows(
    dy_SF: Float[Array, "S F"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "S D"]:
    """Each row times the transposed matrix of its group; for the rest see :func:`grouped_matmul`."""
    E, D, F = w_EDF.shape
    if (reason := refusal(dy_SF, jax.ShapeDtypeStruct((E, F, D), w_EDF.dtype))) is not None:
        raise NotImplementedError(reason)
    return grouped_rows(dy_SF, w_EDF, sizes_E, transpose=True, tuning=tuning(D))


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
    return grouped_weights(x_SD, dy_SF, sizes_E, x_SD.dtype, tuning=tuning_of_matrices(F))


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


def tuning(columns: int) -> Tuning:
    """How kernels cut a result with so many columns."""
    return _cut(columns, 1.05)


def tuning_of_matrices(columns: int) -> Tuning:
    """How the kernel of their gradient cuts matrices with so many columns."""
    return _cut(columns, 1.1)


def _cut(columns: int, most: float) -> Tuning:
    # Wide tiles read less, unless the last one is narrow. Measured: docs/performance.md.
    wide = -(-columns // 192) * 192 <= most * columns
    return Tuning(192, 4, 3) if wide else Tuning(128, 5, 4)


@jax.custom_vjp
def _product(x_SD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    F = w_EDF.shape[2]
    return grouped_rows(x_SD, w_EDF, sizes_E, transpose=False, tuning=tuning(F))


def _forward(x_SD: Array, w_EDF: Array, sizes_E: Array) -> tuple[Array, Any]:
    return _product(x_SD, w_EDF, sizes_E), (x_SD, w_EDF, sizes_E)


def _backward(kept: Any, dy_SF: Array) -> tuple[Array, Array, None]:
    x_SD, w_EDF, sizes_E = kept
    _, D, F = w_EDF.shape
    dx_SD = grouped_rows(dy_SF, w_EDF, sizes_E, transpose=True, tuning=tuning(D))
    dw_EDF = grouped_weights(x_SD, dy_SF, sizes_E, w_EDF.dtype, tuning=tuning_of_matrices(F))
    return dx_SD, dw_EDF, None


_product.defvjp(_forward, _backward)

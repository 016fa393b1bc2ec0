"""As gated rows, with what a backward pass needs, which is kept with both products' columns woven together.

S rows, E groups, K contracted, F columns of each product, H = 2 F. Woven, every 64 columns of the first product stand
before the same ones of the second, so that a tile of the kernel for plain products has both.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.activations import value_and_slope
from stellarbyte_jax.ops.pallas import gated_backward
from stellarbyte_jax.ops.pallas.gated_rows import refusal as refusal_of_rows
from stellarbyte_jax.ops.pallas.grouped_rows import Finish, Products, Tuning, grouped_rows

_PART = 64  # columns that stand together
_TUNING = Tuning(2 * _PART, 5, 4)


def gated_products(
    activation: str, x_SK: Float[Array, "S K"], woven_EKH: Float[Array, "E K H"], sizes_E: Int[Array, " E"]
) -> tuple[Float[Array, "S F"], Float[Array, "S H"]]:
    """``activation(x G) * (x U)`` with the matrices G and U of each row's group, and both products, woven.

    Args:
      activation: of :mod:`stellarbyte_jax.ops.activations`; computed in float32 from the product in the dtype of ``x``.
      x_SK: rows in the order of groups, as :func:`stellarbyte_jax.ops.pallas.grouped_matmul.grouped_matmul` has them.
      woven_EKH: G and U, see :func:`woven`.
      sizes_E: rows of each group, at most S in all.

    Returns:
      Zeros for rows behind the groups.

    Raises:
      NotImplementedError: the device or the arrays are not what the kernels are made for; says why.
    """
    if (reason := refusal(x_SK, woven_EKH)) is not None:
        raise NotImplementedError(reason)
    H, dtype = woven_EKH.shape[2], x_SK.dtype

    def results(products: Products) -> list[tuple[Array, int, int]]:
        both = products.value.astype(dtype)
        gate, up = (both[:, first : first + _PART].astype(jnp.float32) for first in (0, _PART))
        h = value_and_slope(activation, gate)[0] * up
        return [(both, 1, 1), (h.astype(dtype), 0, 2)]

    finish = Finish([H // 2, H], results)
    h_SF, both_SH = grouped_rows(
        x_SK, woven_EKH, sizes_E, transpose=False, tuning=_TUNING, finish=finish, name="gated_products"
    )
    return h_SF, both_SH


def woven(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Two halves of columns woven together."""
    *others, H = x.shape
    return jnp.swapaxes(x.reshape(*others, 2, H // (2 * _PART), _PART), -3, -2).reshape(x.shape)


def unwoven(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """What :func:`woven` was given."""
    *others, H = x.shape
    return jnp.swapaxes(x.reshape(*others, H // (2 * _PART), 2, _PART), -3, -2).reshape(x.shape)


def refusal(x_SK: Array | jax.ShapeDtypeStruct, w_EKH: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernels, that of the backward pass too, do not take these; None where they do."""
    reason = refusal_of_rows(x_SK, w_EKH)
    of_backward = jax.ShapeDtypeStruct((x_SK.shape[0], w_EKH.shape[2] // 2), x_SK.dtype)
    return gated_backward.refusal(of_backward) if reason is None else reason

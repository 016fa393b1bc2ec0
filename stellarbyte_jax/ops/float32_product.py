"""Products in float32 of rows in bfloat16, on the units of a GPU that multiply bfloat16.

D inputs, E outputs. A float32 number is the sum of three of bfloat16, of 8 bits each, and the product of two of these
is exact in float32: so are sums of such products but for the rounding that any sum in float32 has, where tensor cores
cut instead of rounding: an H100 was off by 3e-6 of the sizes of a sum's terms at most. Products of float32 itself leave
these units idle. Henry et al. 2019, https://arxiv.org/abs/1904.06376.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def float32_product(x: Float[Array, "*rows D"], w_DE: Float[Array, "D E"]) -> Float[Array, "*rows E"]:
    """``x w`` as float32 has it.

    The gradient of ``w`` is that of float32 too. That of ``x``, which is rounded to bfloat16, has 16 bits before.

    Args:
      x: bfloat16.
      w_DE: float32.

    Raises:
      ValueError: the dtypes are others.
    """
    if x.dtype != jnp.bfloat16 or w_DE.dtype != jnp.float32:
        raise ValueError(f"the factors must be bfloat16 and float32, not {x.dtype} and {w_DE.dtype}")
    return cast(jax.Array, _product(x, w_DE))


@jax.custom_vjp
def _product(x: Array, w_DE: Array) -> Array:
    return _sum_of_parts(jnp.einsum("...d,de->...e", x, _side_by_side(w_DE), preferred_element_type=jnp.float32))


def _forward(x: Array, w_DE: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w_DE), (x, w_DE)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w_DE = kept
    dw = jnp.einsum("...d,...e->de", x, _side_by_side(dy), preferred_element_type=jnp.float32)
    dy_high, dy_low, _ = _parts(dy)
    w_high, w_low, _ = _parts(w_DE)
    # The product of the low parts is below the 16 bits.
    dy_parts = jnp.concatenate([dy_high, dy_high, dy_low], axis=-1)
    w_parts = jnp.concatenate([w_high, w_low, w_high], axis=-1)
    return jnp.einsum("...e,de->...d", dy_parts, w_parts), _sum_of_parts(dw)


_product.defvjp(_forward, _backward)


def _parts(x: Array) -> list[Array]:
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a mere conversion may be optimized away
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _side_by_side(x: Array) -> Array:
    return jnp.concatenate(_parts(x), axis=-1)


def _sum_of_parts(x: Array) -> Array:
    high, middle, low = jnp.split(x, 3, axis=-1)
    return high + (middle + low)

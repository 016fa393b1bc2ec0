"""Products of activations and weights from factors of 8 bits, which Hopper GPUs multiply twice as fast as 16 bits.

Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433: 4 bits of exponent for what is multiplied forward, 5 for
gradients. Each factor is scaled as a whole, by its largest number at the time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FORWARD, _BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_LEAST = 8.9  # compute capability: Ada


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def float8_product(spec: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of two arrays, summed in float32, in the dtype of ``x``; its gradients are such products too.

    Args:
      spec: without an ellipsis; a letter that one factor alone has is one of the result.
      x: activations.
      w: weights.

    Raises:
      NotImplementedError: a GPU that has no such products.
    """
    return _forward(spec, x, w)[0]


def _forward(spec: str, x: Array, w: Array) -> tuple[Array, Any]:
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is not None and float(capability) < _LEAST:
        raise NotImplementedError(f"products of 8 bits need a GPU of compute capability {_LEAST}, not {capability}")
    given, kept = x.dtype, (*_narrow(x, _FORWARD), *_narrow(w, _FORWARD))
    return _product(spec, *kept).astype(given), (kept, jnp.zeros(0, w.dtype))


def _backward(spec: str, saved: Any, slope: Array) -> tuple[Array, Array]:
    (x, x_scale, w, w_scale), of_weights = saved
    factors, _, result = spec.partition("->")
    of_x, _, of_w = factors.partition(",")
    narrow, scale = _narrow(slope, _BACKWARD)
    dx = _product(f"{result},{of_w}->{of_x}", narrow, scale, w, w_scale)
    dw = _product(f"{of_x},{result}->{of_w}", x, x_scale, narrow, scale)
    return dx.astype(slope.dtype), dw.astype(of_weights.dtype)


float8_product.defvjp(_forward, _backward)


def _narrow(x: Array, dtype: Any) -> tuple[Array, Array]:
    """An array of 8 bits, and the float32 factor that it lacks. What is not finite makes all of it not finite."""
    largest = float(jnp.finfo(dtype).max)
    most = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.where(most > 0, most / largest, 1.0)
    # Numbers of 4 bits of exponent have no infinity: what rounding takes beyond the largest one would be none.
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


def _product(spec: str, x: Array, x_scale: Array, w: Array, w_scale: Array) -> Array:
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32) * (x_scale * w_scale)

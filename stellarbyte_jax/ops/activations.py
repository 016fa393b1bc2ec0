"""Activations of gates, by the name that a config has for them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def value_and_slope(name: str, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """An activation of float32 and its derivative, in operations that kernels for GPUs have.

    Args:
      name: in :data:`ACTIVATIONS`.
      x: float32.
    """
    if name == "silu":
        share = 1 / (1 + jnp.exp(-x))
        return x * share, share * (1 + x * (1 - share))
    if name == "gelu":
        below = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
        return x * below, below + x * (math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x))
    if name == "gelu_pytorch_tanh":
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        turn = jnp.tanh(scale * (x + cubic * x * x * x))
        below = 0.5 * (1 + turn)
        return x * below, below + 0.5 * x * (1 - turn * turn) * (scale * (1 + 3 * cubic * x * x))
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")

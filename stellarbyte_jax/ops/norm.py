"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"], scale_D: Float[Array, " D"], *, eps: float, eps_rule: str = "add"
) -> Float[Array, "*batch D"]:
    """Divides by the root mean square over the last axis and multiplies by a learned scale.

    ``x / sqrt(mean(x^2) + eps) * scale``; the rule ``"clamp"`` uses ``max(mean(x^2), eps)`` in place of the sum.
    Statistics are float32, the result has the dtype of ``x``.
    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.

    Raises:
      ValueError: ``eps_rule`` is neither ``"add"`` nor ``"clamp"``.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    if eps_rule == "add":
        inverse = jax.lax.rsqrt(mean_square + eps)
    elif eps_rule == "clamp":
        inverse = jax.lax.rsqrt(jnp.maximum(mean_square, eps))
    else:
        raise ValueError(f"eps_rule must be 'add' or 'clamp', got {eps_rule!r}")
    scale = scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * inverse * scale).astype(x.dtype)

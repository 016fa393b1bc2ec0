"""Angles of rotary embeddings, and the rotation itself in each pairing of channels.

B batch, T positions, N heads, H head size, P = H/2 rotated pairs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_frequencies(head_size: int, theta: float) -> Float[Array, " P"]:
    """Angle ``theta^(-2i/H)`` by which pair i is rotated from one position to the next, float32.

    Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    exponents_P = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    return theta**-exponents_P


def rotary_angles(
    positions: Int[Array, "B T *K"], frequencies: Float[Array, " P"] | Float[Array, "B #T P"]
) -> Float[Array, "B T *K P"]:
    """Angles of each pair at each position, float32; frequencies may differ from row to row or token to token."""
    if frequencies.ndim > 1 and positions.ndim > 2:
        frequencies = frequencies[:, :, None]
    elif frequencies.ndim == 1:
        frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    return positions[..., None].astype(jnp.float32) * frequencies


def apply_rotary(
    x_BTNH: Float[Array, "B T N H"],
    angles: Float[Array, "B T P"] | Float[Array, "B T #N P"],
    *,
    pairing: str,
    scale: Float[Array, "#B T P"] | Float[Array, "B T #N P"] | None = None,
    magnitude: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Rotates each pair of channels by its angle, and multiplies it by ``scale`` where given.

    Pairing ``"half"`` joins channel i with i + H/2, ``"interleaved"`` 2i with 2i + 1. ``"mixed"`` is the original
    StellarByte's: scaled first, then channel i takes its partner from the interleaved pairing and its angle from the
    half pairing. That is no rotation, and scores depend on positions and not on distances alone; it exists for weights
    that were trained with it. Computed in float32, rerotated in the dtype of ``x``.

    Raises:
      ValueError: the pairing has another name.
    """
    x32 = x_BTNH.astype(jnp.float32)
    cos, sin = _per_head(jnp.cos(angles)) * magnitude, _per_head(jnp.sin(angles)) * magnitude
    if scale is not None:
        x32 = x32 * _spread(_per_head(scale), pairing)
    if pairing == "half":
        first, second = jnp.split(x32, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    elif pairing == "interleaved":
        first, second = x32[..., 0::2], x32[..., 1::2]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x32.shape)
    elif pairing == "mixed":
        first, second = jnp.split(x32, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - x32[..., 1::2] * sin, second * cos + x32[..., 0::2] * sin], axis=-1)
    else:
        raise ValueError(f"pairing must be 'half', 'interleaved' or 'mixed', got {pairing!r}")
    return rotated.astype(x_BTNH.dtype)


def scale_pairs(
    x_BTNH: Float[Array, "B T N H"], scale: Float[Array, "B T P"] | Float[Array, "B T #N P"], *, pairing: str
) -> Float[Array, "B T N H"]:
    """Multiplies both channels of each pair by its factor, in float32; the result has the dtype of ``x``."""
    return (x_BTNH.astype(jnp.float32) * _spread(_per_head(scale), pairing)).astype(x_BTNH.dtype)


def _per_head(values: Array) -> Array:
    return values[:, :, None] if values.ndim == 3 else values


def _spread(factor: Array, pairing: str) -> Array:
    """The factor of each channel."""
    return jnp.repeat(factor, 2, axis=-1) if pairing == "interleaved" else jnp.concatenate([factor, factor], axis=-1)

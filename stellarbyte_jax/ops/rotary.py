"""Rotary position embeddings: RoPE in both pairings, and XPos.

B batch, T positions, N heads, H head size, P = H/2 rotated pairs.

XPos multiplies a query at distance m from some origin by ``exp(-r m / base)`` and a key at n by ``exp(r n / base)``, so
that pair i of their score decays with their distance at the rate ``r_i``. The origin cancels; each caller takes one
that keeps its factors inside the range of floats.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Of the XPos paper: the fastest decaying pair keeps 0.4 / 1.4 of its score every ``scale_base`` positions.
_XPOS_GAMMA = 0.4
# The logarithm of the largest float32, and of the largest bfloat16, is 88.
_LARGEST_EXPONENT = 80.0


def rotary_frequencies(head_size: int, theta: float) -> Float[Array, " P"]:
    """Angle ``theta^(-2i/H)`` that pair i turns from one position to the next, float32.

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
    """Turns each pair of channels by its angle, and multiplies it by ``scale`` where given.

    Pairing ``"half"`` joins channel i with i + H/2, ``"interleaved"`` 2i with 2i + 1. ``"mixed"`` is the original
    StellarByte's: scaled first, then channel i takes its partner from the interleaved pairing and its angle from the
    half pairing. That is no rotation, and scores depend on positions and not on distances alone; it exists for weights
    that were trained with it. Computed in float32, returned in the dtype of ``x``.

    Raises:
      ValueError: the pairing has another name.
    """
    x32 = x_BTNH.astype(jnp.float32)
    cos, sin = _per_head(jnp.cos(angles)) * magnitude, _per_head(jnp.sin(angles)) * magnitude
    if scale is not None:
        x32 = x32 * _spread(_per_head(scale), pairing)
    if pairing == "half":
        first, second = jnp.split(x32, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    elif pairing == "interleaved":
        first, second = x32[..., 0::2], x32[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x32.shape)
    elif pairing == "mixed":
        first, second = jnp.split(x32, 2, axis=-1)
        turned = jnp.concatenate([first * cos - x32[..., 1::2] * sin, second * cos + x32[..., 0::2] * sin], axis=-1)
    else:
        raise ValueError(f"pairing must be 'half', 'interleaved' or 'mixed', got {pairing!r}")
    return turned.astype(x_BTNH.dtype)


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


def xpos_rates(head_size: int) -> Float[Array, " P"]:
    """The paper's rate of decay ``-log((2i/H + 0.4) / 1.4)`` of each pair, float32.

    Sun et al. 2022, https://arxiv.org/abs/2212.10554.
    """
    pair_P = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    return -jnp.log((pair_P + _XPOS_GAMMA) / (1 + _XPOS_GAMMA))


def xpos_factors(
    distances: Int[Array, "B T *K"], rates_P: Float[Array, " P"], *, scale_base: float
) -> Float[Array, "B T *K P"]:
    """``exp(-rate * distance / scale_base)``, float32.

    For queries with their distance from the origin, for keys with its negative. Growth is cut off before it overflows;
    up to :func:`longest_xpos_row` positions around the origin none is. Decay is not, or far keys would stay visible.
    """
    rates = rates_P.astype(jnp.float32).reshape((1,) * distances.ndim + (-1,))
    exponents = -rates * distances[..., None].astype(jnp.float32) / scale_base
    return jnp.exp(jnp.minimum(exponents, _LARGEST_EXPONENT))


def longest_xpos_row(scale_base: float) -> int:
    """Positions that one row may span with the paper's rates and the origin in its middle."""
    fastest = -math.log(_XPOS_GAMMA / (1 + _XPOS_GAMMA))
    return int(2 * _LARGEST_EXPONENT * scale_base / fastest)

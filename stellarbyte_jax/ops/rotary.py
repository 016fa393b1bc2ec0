"""Rotary position embeddings: RoPE in both pairings, and XPos.

B batch, T positions, N heads, H head size, P = H/2 rotated pairs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Of the XPos paper: the slowest decaying pair keeps 0.4 / 1.4 of its score every ``scale_base`` positions.
_XPOS_GAMMA = 0.4


def rotary_angles(positions_BT: Int[Array, "B T"], *, head_size: int, theta: float) -> Float[Array, "B T P"]:
    """Angles ``p * theta^(-2i/H)`` of pair i at position p, float32.

    Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    exponents_P = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    frequencies_P = theta**-exponents_P
    return positions_BT[:, :, None].astype(jnp.float32) * frequencies_P[None, None, :]


def apply_rotary(
    x_BTNH: Float[Array, "B T N H"],
    angles_BTP: Float[Array, "B T P"],
    *,
    pairing: str,
    scale_BTP: Float[Array, "B T P"] | None = None,
) -> Float[Array, "B T N H"]:
    """Turns each pair of channels by its angle, and multiplies it by ``scale_BTP`` where given.

    Pairing ``"half"`` joins channel i with i + H/2, ``"interleaved"`` 2i with 2i + 1. Computed in float32,
    returned in the dtype of ``x``.

    Raises:
      ValueError: the pairing has another name.
    """
    x32 = x_BTNH.astype(jnp.float32)
    cos_BT1P, sin_BT1P = jnp.cos(angles_BTP)[:, :, None, :], jnp.sin(angles_BTP)[:, :, None, :]
    if scale_BTP is not None:
        cos_BT1P = cos_BT1P * scale_BTP[:, :, None, :]
        sin_BT1P = sin_BT1P * scale_BTP[:, :, None, :]
    if pairing == "half":
        first, second = jnp.split(x32, 2, axis=-1)
        turned = jnp.concatenate([first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P], axis=-1)
    elif pairing == "interleaved":
        first, second = x32[..., 0::2], x32[..., 1::2]
        turned = jnp.stack(
            [first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P], axis=-1
        ).reshape(x32.shape)
    else:
        raise ValueError(f"pairing must be 'half' or 'interleaved', got {pairing!r}")
    return turned.astype(x_BTNH.dtype)


def xpos_scale(
    positions_BT: Int[Array, "B T"], *, head_size: int, scale_base: float, center: int
) -> Float[Array, "B T P"]:
    """Factor ``zeta_i^((p - center) / scale_base)`` of queries; keys take its inverse. Float32.

    ``zeta_i = (2i/H + 0.4) / 1.4 < 1``, so the score of a query and a key decays with their distance. The center
    cancels in the product and only keeps the factors near one.
    Sun et al. 2022, https://arxiv.org/abs/2212.10554.
    """
    pair_P = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    log_zeta_P = jnp.log((pair_P + _XPOS_GAMMA) / (1 + _XPOS_GAMMA))
    distance_BT1 = (positions_BT - center)[:, :, None].astype(jnp.float32) / scale_base
    return jnp.exp(distance_BT1 * log_zeta_P[None, None, :])

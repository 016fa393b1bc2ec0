"""How queries and keys get their positions: which frequencies, and what is done before a key is kept and after.

Keys are kept turned. Two settings forbid that: with dynamic scaling a longer text turns all of its keys in another way,
and the original's mixed pairing cannot be scaled after it was turned; there they are kept as they are. XPos factors of
kept keys are applied when they are read, counted from the middle of the new tokens, so that they never overflow.

B batch, T new positions, S positions of keys, N query heads, K key/value heads, H head size, P = H/2 rotated pairs.
"""

import jax
import jax.numpy as jnp
from flax import struct

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.ops.rope_scaling import dynamic_frequencies, scaled_frequencies
from stellarbyte_jax.ops.rotary import (
    apply_rotary,
    longest_xpos_row,
    rotary_angles,
    scale_pairs,
    xpos_factors,
    xpos_rates,
)


@struct.dataclass
class Rotation:
    """Rotary frequencies of a call.

    Attributes:
      frequencies: [P]; with dynamic scaling of each row or token, [B, 1 or T, P].
      magnitude: static factor of cosines and sines.
    """

    frequencies: jax.Array
    magnitude: float = struct.field(pytree_node=False, default=1.0)


def rotation(
    config: ByteConfig, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, real_BT: jax.Array, cached: bool
) -> Rotation:
    """The frequencies for tokens at these positions; ``cached`` says that earlier tokens of a row stand in a cache."""
    scaling = config.rope_scaling
    if scaling.name == "dynamic":
        if cached:
            lengths_BT = jnp.max(jnp.where(real_BT, positions_BT, 0), axis=1, keepdims=True) + 1
        else:
            lengths_BT = document_lengths(positions_BT, segment_ids_BT, real_BT)
        frequencies = dynamic_frequencies(
            lengths_BT,
            head_size=config.head_size,
            theta=config.rope_theta,
            factor=scaling.factor,
            max_positions=config.max_position_embeddings,
        )
        return Rotation(frequencies)
    frequencies, magnitude = scaled_frequencies(
        head_size=config.head_size,
        theta=config.rope_theta,
        scaling=scaling.name,
        factor=scaling.factor,
        max_positions=config.max_position_embeddings,
        original_positions=scaling.original_max_position_embeddings,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        attention_factor=scaling.attention_factor,
    )
    return Rotation(frequencies, magnitude)


def document_lengths(positions_BT: jax.Array, segment_ids_BT: jax.Array | None, real_BT: jax.Array) -> jax.Array:
    """For each token the length of its document as far as it stands in the row, int32 [B, T]."""
    if segment_ids_BT is None:
        segment_ids_BT = real_BT.astype(jnp.int32)
    T = positions_BT.shape[1]
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    ends_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end_BT = jax.lax.cummin(jnp.where(ends_BT, index_1T, T), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, end_BT, axis=1) + 1


def initial_rates(config: ByteConfig) -> jax.Array:
    """XPos rates [P] that a model begins with, or keeps; the original's grow with distance instead."""
    if config.position_embedding == "stellarbyte":
        return -jnp.arange(0, config.head_size, 2, dtype=jnp.float32) / config.head_size
    return xpos_rates(config.head_size)


def _pairing(config: ByteConfig) -> str:
    return "mixed" if config.position_embedding == "stellarbyte" else config.rope_pairing


def _keeps_unturned(config: ByteConfig) -> bool:
    return config.rope_scaling.name == "dynamic" or config.position_embedding == "stellarbyte"


def turn_together(
    config: ByteConfig,
    how: Rotation,
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    positions_BS: jax.Array,
    rates_P: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys of the same positions, ready for attention.

    XPos counts distances in the row, where they equal those of positions within each document.

    Raises:
      ValueError: XPos factors of so long a row would overflow.
    """
    angles = rotary_angles(positions_BS, how.frequencies)
    scale_q = scale_k = None
    if config.position_embedding == "stellarbyte":
        scale_q, scale_k = _mixed_factors(config, positions_BS, positions_BS, rates_P)
    elif rates_P is not None:
        S = q_BSNH.shape[1]
        _check_xpos_row(config, S)
        distances_1S = (jnp.arange(S, dtype=jnp.int32) - S // 2)[None, :]
        scale_q = xpos_factors(distances_1S, rates_P, scale_base=config.xpos_scale_base)
        scale_k = xpos_factors(-distances_1S, rates_P, scale_base=config.xpos_scale_base)
    q_BSNH = _turn(config, how, q_BSNH, angles, scale_q)
    return q_BSNH, _turn(config, how, k_BSKH, angles, scale_k)


def to_keep(config: ByteConfig, how: Rotation, k_BSKH: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """Keys as a cache keeps them."""
    if _keeps_unturned(config):
        return k_BSKH
    return _turn(config, how, k_BSKH, rotary_angles(positions_BS, how.frequencies), None)


def turn_kept(
    config: ByteConfig,
    how: Rotation,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    positions_BT: jax.Array,
    key_positions_BSK: jax.Array,
    rates_P: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Queries of new tokens and kept keys, ready for attention; key positions are [B, S, 1] or differ by head."""
    scale_q = scale_k = None
    if config.position_embedding == "stellarbyte":
        scale_q, scale_k = _mixed_factors(config, positions_BT, key_positions_BSK, rates_P)
    elif rates_P is not None:
        T = positions_BT.shape[1]
        _check_xpos_row(config, T)
        middle_B1 = positions_BT[:, T // 2 : T // 2 + 1]
        scale_q = xpos_factors(positions_BT - middle_B1, rates_P, scale_base=config.xpos_scale_base)
        scale_k = xpos_factors(middle_B1[..., None] - key_positions_BSK, rates_P, scale_base=config.xpos_scale_base)
    q_BTNH = _turn(config, how, q_BTNH, rotary_angles(positions_BT, how.frequencies), scale_q)
    if _keeps_unturned(config):
        k_BSKH = _turn(config, how, k_BSKH, rotary_angles(key_positions_BSK, how.frequencies), scale_k)
    elif scale_k is not None:
        k_BSKH = scale_pairs(k_BSKH, scale_k, pairing=config.rope_pairing)
    return q_BTNH, k_BSKH


def _check_xpos_row(config: ByteConfig, positions: int) -> None:
    longest = longest_xpos_row(config.xpos_scale_base)
    if longest < positions:
        raise ValueError(
            f"{positions} positions in a row are more than the {longest} whose XPos factors floats can hold: feed the "
            "row in parts through a KV cache, or raise xpos_scale_base"
        )


def _mixed_factors(config: ByteConfig, positions: jax.Array, key_positions: jax.Array, rates_P: jax.Array | None):
    """The original's factors. With its pairing their origin does not cancel: it is the middle of the trained length."""
    assert rates_P is not None
    center = config.max_position_embeddings // 2
    return (
        xpos_factors(positions - center, rates_P, scale_base=config.xpos_scale_base),
        xpos_factors(center - key_positions, rates_P, scale_base=config.xpos_scale_base),
    )


def _turn(config: ByteConfig, how: Rotation, x: jax.Array, angles: jax.Array, scale: jax.Array | None) -> jax.Array:
    return apply_rotary(x, angles, pairing=_pairing(config), scale=scale, magnitude=how.magnitude)

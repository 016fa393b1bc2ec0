"""Which position scheme a model has. No other file asks."""

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.ops.rotary import Rope, Scaling, StellarByteRope, XPos


def position_scheme(config: ByteConfig) -> Rope:
    """The scheme that ``config`` names, with its settings."""
    s = config.rope_scaling
    scaling = Scaling(
        max_positions=config.max_position_embeddings,
        name=s.name,
        factor=s.factor,
        original_positions=s.original_max_position_embeddings,
        low_freq_factor=s.low_freq_factor,
        high_freq_factor=s.high_freq_factor,
        beta_fast=s.beta_fast,
        beta_slow=s.beta_slow,
        attention_factor=s.attention_factor,
    )
    head_size, theta = config.head_size, config.rope_theta
    if config.position_embedding == "xpos":
        return XPos(
            head_size=head_size,
            theta=theta,
            pairing=config.rope_pairing,
            scaling=scaling,
            scale_base=config.xpos_scale_base,
            learnable=config.xpos_learnable,
        )
    if config.position_embedding == "stellarbyte":
        return StellarByteRope(
            head_size=head_size, theta=theta, pairing="mixed", scaling=scaling, scale_base=config.xpos_scale_base
        )
    return Rope(head_size=head_size, theta=theta, pairing=config.rope_pairing, scaling=scaling)

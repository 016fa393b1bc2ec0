"""Initial weights of matrices by their role."""

from typing import Literal

import flax.linen as nn

from stellarbyte_jax.config import ByteConfig

Role = Literal["embed", "head", "query", "value", "output", "mlp_in", "mlp_out"]


def matrix_init(config: ByteConfig, role: Role, fan_in: int, fan_out: int) -> nn.initializers.Initializer:
    """The initializer of a matrix by its role; ``query`` is that of keys too.

    All are normal. ``"normal"`` has the deviation ``s = initializer_range`` everywhere, ``"depth"`` has
    ``s / sqrt(2L)`` for what writes into the residual stream (output, mlp_out; Radford et al. 2019), ``"stellarbyte"``
    for everything.
    ``"deepnorm"`` has Glorot's ``gain * sqrt(2 / (fan_in + fan_out))`` with the gain ``(8L)^(-1/4)``, but 1 for query
    and key, and s for embed and head (Wang et al. 2022, https://arxiv.org/abs/2203.00555).
    """
    scheme, std, L = config.init_scheme, config.initializer_range, config.num_hidden_layers
    if scheme == "deepnorm" and role not in ("embed", "head"):
        gain = 1.0 if role == "query" else (8 * L) ** -0.25
        std = gain * (2 / (fan_in + fan_out)) ** 0.5
    elif scheme == "stellarbyte" or (scheme == "depth" and role in ("output", "mlp_out")):
        std /= (2 * L) ** 0.5
    return nn.initializers.normal(std)

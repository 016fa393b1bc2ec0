"""The normalisation layer.

D size of the last axis.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.params import param
from stellarbyte_jax.ops.norm import rms_norm
from stellarbyte_jax.sharding import constrain, stream_axes


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, whose name is an attribute."""

    config: ByteConfig
    axis: str = "embed"
    eps: float | None = None  # another one than the model's

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Maps [..., D] to [..., D]; of the model's width [B, T, D] to [B, T, D]."""
        scale_D = param(self, "scale", nn.initializers.ones, {self.axis: x.shape[-1]}, float32=True)
        c = self.config
        normalised = rms_norm(x, scale_D, eps=self.eps or c.rms_norm_eps, eps_rule=c.rms_norm_eps_rule)
        if self.axis != "embed":
            return normalised
        # Or the compiler gathers it for the products in float32, and casts then.
        return constrain(normalised, (*stream_axes(x.shape[1]), "act_embed"))

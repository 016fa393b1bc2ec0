"""The normalisation layer.

D size of the last axis.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.params import param
from stellarbyte_jax.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, whose name is an attribute."""

    config: ByteConfig
    axis: str = "embed"
    eps: float | None = None  # another one than the model's

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Maps [..., D] to [..., D]."""
        scale_D = param(self, "scale", nn.initializers.ones, {self.axis: x.shape[-1]}, float32=True)
        return rms_norm(x, scale_D, eps=self.eps or self.config.rms_norm_eps, eps_rule=self.config.rms_norm_eps_rule)

"""Dynamic loss scaling: gradients of 16-bit floats with 5 bits of exponent are computed of a larger loss.

Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740. Where a gradient overflows, the step is left out and the
factor halved; after many steps without that it is doubled.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from stellarbyte_jax.config import TrainConfig

_LARGEST = 2.0**24  # as much below what a float32 loss can hold as gradients of tokens may be apart


@struct.dataclass
class LossScale:
    """What loss scaling carries from step to step.

    Attributes:
      factor: of the loss, float32; a power of two times the initial one.
      since: steps since it was changed, int32.
      skipped: steps that were left out since the run began, int32.
    """

    factor: Array
    since: Array
    skipped: Array

    @classmethod
    def initial(cls, config: TrainConfig) -> "LossScale | None":
        """That of a run before its first step; None where the compute dtype needs none."""
        if config.model.compute_dtype != "float16":
            return None
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.asarray(config.loss_scale.initial, jnp.float32), zero, zero)

    @property
    def is_least(self) -> Array:
        """Whether a smaller factor would be none."""
        return self.factor <= 1

    def after(self, overflow: Array, growth_interval: int) -> "LossScale":
        """That of the next step.

        Args:
          overflow: whether a gradient was not finite, bool scalar.
          growth_interval: steps without that after which the factor is doubled.
        """
        grows = self.since + 1 >= growth_interval
        larger = jnp.minimum(2 * self.factor, jnp.maximum(self.factor, _LARGEST))
        kept = jnp.where(grows, larger, self.factor)
        return LossScale(
            jnp.where(overflow, jnp.maximum(self.factor / 2, 1.0), kept),
            jnp.where(overflow | grows, 0, self.since + 1),
            self.skipped + overflow.astype(jnp.int32),
        )

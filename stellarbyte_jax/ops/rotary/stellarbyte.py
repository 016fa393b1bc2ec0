"""The positions of the original StellarByte, for weights that were trained with them.

B batch, T new tokens, S keys, N query heads, K key/value heads, H head size, P = H/2 rotated pairs.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.rotary.rope import Rope
from stellarbyte_jax.ops.rotary.xpos import xpos_factors


@dataclass(frozen=True, kw_only=True)
class StellarByteRope(Rope):
    """Rotations with the pairing ``mixed``, and factors whose rates grow scores with distance.

    With that pairing the origin of the factors does not cancel: it is the middle of the trained length. Scores depend
    on positions and not on distances alone, and keys are cached before rotation.

    Attributes:
      scale_base: distance over which a score changes by ``exp(-rate)``.
    """

    scale_base: float

    @property
    def relative(self) -> bool:
        """False: texts are bound to the trained length, whatever a layer sees."""
        return False

    @property
    def rates(self) -> Float[Array, " P"]:
        """The original's rates; negative, so that scores grow with distance."""
        return -jnp.arange(0, self.head_size, 2, dtype=jnp.float32) / self.head_size

    @property
    def caches_rotated(self) -> bool:
        """False: with this pairing keys cannot be scaled after rotation."""
        return False

    def _factors(
        self, rates_P: Array | None, q_indices_BT: Array, k_indices: Array, middle_B1: Array
    ) -> tuple[Array, Array]:
        del middle_B1
        assert rates_P is not None
        center = self.scaling.max_positions // 2
        return (
            xpos_factors(q_indices_BT - center, rates_P, scale_base=self.scale_base),
            xpos_factors(center - k_indices, rates_P, scale_base=self.scale_base),
        )

"""The positions of the original StellarByte, for weights that were trained with them.

B batch, T new tokens, S keys, N query heads, K key/value heads, H head size, P = H/2 rotated pairs.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.rotary.angles import rotary_angles
from stellarbyte_jax.ops.rotary.rope import Frequencies, Rope
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

    def rotate(
        self,
        frequencies: Frequencies,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        positions_BS: Int[Array, "B S"],
        rows_BS: Int[Array, "#B S"],
        rates_P: Float[Array, " P"] | None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """As :meth:`Rope.rotate`."""
        del rows_BS
        positions_BT = positions_BS[:, k_BSKH.shape[1] - q_BTNH.shape[1] :]
        return self.from_cache(frequencies, q_BTNH, k_BSKH, positions_BT, positions_BS[..., None], rates_P)

    def to_cache(
        self, frequencies: Frequencies, k_BSKH: Float[Array, "B S K H"], positions_BS: Int[Array, "B S"]
    ) -> Float[Array, "B S K H"]:
        """Keys as they are: with this pairing they cannot be scaled after rotation."""
        del frequencies, positions_BS
        return k_BSKH

    def from_cache(
        self,
        frequencies: Frequencies,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        positions_BT: Int[Array, "B T"],
        key_positions_BSK: Int[Array, "B S #K"],
        rates_P: Float[Array, " P"] | None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """As :meth:`Rope.from_cache`."""
        assert rates_P is not None
        center = self.scaling.max_positions // 2
        scale_q = xpos_factors(positions_BT - center, rates_P, scale_base=self.scale_base)
        scale_k = xpos_factors(center - key_positions_BSK, rates_P, scale_base=self.scale_base)
        q_BTNH = self._apply(frequencies, q_BTNH, rotary_angles(positions_BT, frequencies.values), scale_q)
        angles = rotary_angles(key_positions_BSK, frequencies.values)
        return q_BTNH, self._apply(frequencies, k_BSKH, angles, scale_k)

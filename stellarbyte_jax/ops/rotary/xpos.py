"""XPos: rotations, and scores that decay with distance.

A query at distance m from some origin is multiplied by ``exp(-r m / base)``, a key at n by ``exp(r n / base)``, so that
pair i of their score decays with their distance at the rate ``r_i``. The origin cancels; each caller takes one that
keeps its factors within the range of floats.

B batch, T new tokens, S keys, N query heads, K key/value heads, H head size, P = H/2 rotated pairs.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.rotary.angles import rotary_angles, scale_pairs
from stellarbyte_jax.ops.rotary.rope import Frequencies, Rope

# Of the XPos paper: the fastest decaying pair keeps 0.4 / 1.4 of its score every ``scale_base`` positions.
_XPOS_GAMMA = 0.4
# The logarithm of the largest float32, and of the largest bfloat16, is 88.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, kw_only=True)
class XPos(Rope):
    """Sun et al. 2022, https://arxiv.org/abs/2212.10554, with rates that a layer may learn.

    Keys are cached after rotation, without their factors. These are applied when the keys are read, counted from the
    middle of the new tokens, so that a cache is good at any length.

    Attributes:
      scale_base: distance over which a score decays by ``exp(-rate)``.
    """

    scale_base: float

    @property
    def max_length(self) -> int | None:
        """Any: attention fades with distance."""
        return None

    @property
    def longest_row(self) -> int | None:
        """Tokens whose factors, with the origin in the middle, floats can hold."""
        return longest_xpos_row(self.scale_base)

    @property
    def rates(self) -> Float[Array, " P"]:
        """The paper's rates of decay."""
        return xpos_rates(self.head_size)

    def rotate(
        self,
        frequencies: Frequencies,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        positions_BS: Int[Array, "B S"],
        rows_BS: Int[Array, "#B S"],
        rates_P: Float[Array, " P"] | None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """As :meth:`Rope.rotate`. Distances are those in the row, which within a document equal those of positions."""
        assert rates_P is not None
        S = k_BSKH.shape[1]
        first = S - q_BTNH.shape[1]
        self._check_row(S)
        distances_BS = rows_BS - rows_BS[:, S // 2 : S // 2 + 1]
        angles_BSP = rotary_angles(positions_BS, frequencies.values)
        scale_q = xpos_factors(distances_BS[:, first:], rates_P, scale_base=self.scale_base)
        scale_k = xpos_factors(-distances_BS, rates_P, scale_base=self.scale_base)
        q_BTNH = self._apply(frequencies, q_BTNH, angles_BSP[:, first:], scale_q)
        return q_BTNH, self._apply(frequencies, k_BSKH, angles_BSP, scale_k)

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
        T = positions_BT.shape[1]
        self._check_row(T)
        middle_B1 = positions_BT[:, T // 2 : T // 2 + 1]
        scale_q = xpos_factors(positions_BT - middle_B1, rates_P, scale_base=self.scale_base)
        scale_k = xpos_factors(middle_B1[..., None] - key_positions_BSK, rates_P, scale_base=self.scale_base)
        q_BTNH = self._apply(frequencies, q_BTNH, rotary_angles(positions_BT, frequencies.values), scale_q)
        if self.scaling.name == "dynamic":
            angles = rotary_angles(key_positions_BSK, frequencies.values)
            return q_BTNH, self._apply(frequencies, k_BSKH, angles, scale_k)
        return q_BTNH, scale_pairs(k_BSKH, scale_k, pairing=self.pairing)

    def _check_row(self, tokens: int) -> None:
        longest = longest_xpos_row(self.scale_base)
        if longest < tokens:
            raise ValueError(
                f"{tokens} positions in a row are more than the {longest} whose XPos factors floats can hold: feed the "
                "row in parts through a KV cache, or raise xpos_scale_base"
            )


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

    For queries with their distance from the origin, for keys with its negative. Growth is clipped before it overflows;
    up to :func:`longest_xpos_row` positions around the origin nothing is clipped. Decay never is, or distant keys would
    stay visible.
    """
    rates = rates_P.astype(jnp.float32).reshape((1,) * distances.ndim + (-1,))
    exponents = -rates * distances[..., None].astype(jnp.float32) / scale_base
    return jnp.exp(jnp.minimum(exponents, _LARGEST_EXPONENT))


def longest_xpos_row(scale_base: float) -> int:
    """Positions that one row may span, with the paper's rates and the origin in its middle."""
    fastest = -math.log(_XPOS_GAMMA / (1 + _XPOS_GAMMA))
    return int(2 * _LARGEST_EXPONENT * scale_base / fastest)

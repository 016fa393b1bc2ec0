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

from stellarbyte_jax.ops.rotary.rope import Rope

# Of the XPos paper: the fastest decaying pair keeps 0.4 / 1.4 of its score every ``scale_base`` positions.
_XPOS_GAMMA = 0.4
_FASTEST_LEARNED = 2  # times the paper's fastest rate
# The logarithm of the largest float32, and of the largest bfloat16, is 88.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, kw_only=True)
class XPos(Rope):
    """Sun et al. 2022, https://arxiv.org/abs/2212.10554, with rates that a layer may learn.

    Keys are cached after rotation, without their factors. These are applied when the keys are read, counted from the
    middle of the new tokens, so that a cache is good at any length.

    Attributes:
      scale_base: distance over which a score decays by ``exp(-rate)``.
      learnable: whether layers learn their rates. Scores then decay at most twice as fast as the paper's fastest, and
        a row may be half as long.
    """

    scale_base: float
    learnable: bool = False

    @property
    def max_length(self) -> int | None:
        """Any: attention fades with distance."""
        return None

    @property
    def longest_row(self) -> int | None:
        """Tokens whose factors, with the origin in the middle, floats can hold."""
        return longest_xpos_row(self.scale_base) // (_FASTEST_LEARNED if self.learnable else 1)

    @property
    def rates(self) -> Float[Array, " P"]:
        """The paper's rates of decay."""
        return xpos_rates(self.head_size)

    def _factors(
        self, rates_P: Array | None, q_indices_BT: Array, k_indices: Array, middle_B1: Array
    ) -> tuple[Array, Array]:
        assert rates_P is not None
        if self.learnable:
            rates_P = jnp.minimum(rates_P, _FASTEST_LEARNED * _fastest_rate())
        middle = middle_B1.reshape(middle_B1.shape + (1,) * (k_indices.ndim - 2))
        return (
            xpos_factors(q_indices_BT - middle_B1, rates_P, scale_base=self.scale_base),
            xpos_factors(middle - k_indices, rates_P, scale_base=self.scale_base),
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
    return int(2 * _LARGEST_EXPONENT * scale_base / _fastest_rate())


def _fastest_rate() -> float:
    return -math.log(_XPOS_GAMMA / (1 + _XPOS_GAMMA))

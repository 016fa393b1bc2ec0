"""Rotary frequencies for more positions than a model was trained with.

B batch, T tokens, H head size, P = H/2 rotated pairs.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.rotary.angles import rotary_frequencies


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which frequencies a model uses; see :func:`scaled_frequencies`.

    Attributes:
      name: ``none``, ``linear``, ``dynamic``, ``yarn`` or ``llama3``.
      factor: how many times longer the texts are.
      max_positions: positions that the model was trained with (yarn and llama3: of the stretched model).
      original_positions: yarn and llama3: positions before stretching; None for ``max_positions``.
      low_freq_factor: llama3.
      high_freq_factor: llama3.
      beta_fast: yarn.
      beta_slow: yarn.
      attention_factor: yarn.
    """

    max_positions: int
    name: str = "none"
    factor: float = 1.0
    original_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def max_length(self) -> int:
        """Positions that a text may have; with yarn and llama3 ``max_positions`` is the stretched length already."""
        return int(self.max_positions * (self.factor if self.name in ("linear", "dynamic") else 1.0))


def scaled_frequencies(head_size: int, theta: float, scaling: Scaling) -> tuple[Float[Array, " P"], float]:
    """Angle of each pair from one position to the next, float32, and a factor of all cosines and sines.

    With the plain frequencies ``f_i = theta^(-2i/H)`` and ``s = factor``:

    - ``none``: ``f``. ``dynamic``: ``f`` too, for texts within ``max_positions``; see :func:`dynamic_frequencies`.
    - ``linear``: ``f / s``, which is positions divided by s (Chen et al. 2023, https://arxiv.org/abs/2306.15595).
    - ``yarn``: ``f`` for pairs with more than ``beta_fast`` rotations over the original length, ``f / s`` for those
      with less than ``beta_slow``, a ramp over whole pairs between them. The second value is
      ``attention_factor``, where that is None ``0.1 ln(s) + 1``; it is 1 for all other scalings
      (Peng et al. 2023, https://arxiv.org/abs/2309.00071).
    - ``llama3``: ``f`` for waves shorter than the original length divided by ``high_freq_factor``, ``f / s`` for those
      longer than it divided by ``low_freq_factor``, in between a blend that is linear in ``f``
      (Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783; the rule is that of the published Llama 3.1 models).

    The original length is ``original_positions``, or ``max_positions`` where that is None.

    Raises:
      ValueError: there is no scaling of that name, or yarn is asked for with a theta of 1 or less.
    """
    plain_P = rotary_frequencies(head_size, theta)
    original = scaling.original_positions or scaling.max_positions
    factor = scaling.factor
    if scaling.name in ("none", "dynamic"):
        return plain_P, 1.0
    if scaling.name == "linear":
        return plain_P / factor, 1.0
    if scaling.name == "yarn":
        stretched_P = _yarn_stretched_share(head_size, theta, original, scaling.beta_fast, scaling.beta_slow)
        magnitude = scaling.attention_factor
        if magnitude is None:
            magnitude = 0.1 * math.log(factor) + 1.0
        return plain_P / factor * stretched_P + plain_P * (1 - stretched_P), magnitude
    if scaling.name == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        rotations_P = plain_P * (original / (2 * math.pi))
        unscaled_P = jnp.clip((rotations_P - low) / (high - low), 0, 1)
        return plain_P / factor * (1 - unscaled_P) + plain_P * unscaled_P, 1.0
    raise ValueError(f"scaling must be 'none', 'linear', 'dynamic', 'yarn' or 'llama3', got {scaling.name!r}")


def _yarn_stretched_share(
    head_size: int, theta: float, original: int, beta_fast: float, beta_slow: float
) -> Float[Array, " P"]:
    """0 for pairs whose frequency is unchanged, 1 for those whose frequency is divided by the factor."""
    if theta <= 1:
        raise ValueError(f"yarn needs frequencies that fall from pair to pair: theta must be above 1, got {theta}")

    def pair_with(rotations: float) -> float:
        return head_size * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    first = max(math.floor(pair_with(beta_fast)), 0)
    last = min(math.ceil(pair_with(beta_slow)), head_size - 1)
    width = last - first or 1  # a step where both are the same pair
    return jnp.clip((jnp.arange(head_size // 2, dtype=jnp.float32) - first) / width, 0, 1)


def dynamic_frequencies(
    lengths: Int[Array, "B T"], head_size: int, theta: float, scaling: Scaling
) -> Float[Array, "B T P"]:
    """Frequencies of texts of so many tokens, float32: plain up to ``max_positions``, lower the longer the text.

    Dynamic NTK scaling: ``theta`` grows to ``theta * g^(H / (H - 2))`` with
    ``g = factor * length / max_positions - (factor - 1)``. So the frequency of pair i is divided by
    ``g^(2i / (H - 2))``: 1 for the fastest pair, g for the slowest one. All tokens of a text need the same length.

    Described in Peng et al. 2023, https://arxiv.org/abs/2309.00071.
    """
    over = jnp.maximum(lengths - scaling.max_positions, 0).astype(jnp.float32)
    growth_BT1 = (1 + scaling.factor * over / scaling.max_positions)[..., None]
    exponents_P = jnp.arange(0, head_size, 2, dtype=jnp.float32) / max(head_size - 2, 1)
    return rotary_frequencies(head_size, theta)[None, None] * growth_BT1 ** -exponents_P[None, None]

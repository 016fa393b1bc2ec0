"""Rotary frequencies for more positions than a model was trained with.

B batch, T tokens, H head size, P = H/2 rotated pairs.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.rotary import rotary_frequencies


def scaled_frequencies(
    *,
    head_size: int,
    theta: float,
    scaling: str,
    factor: float,
    max_positions: int,
    original_positions: int | None,
    low_freq_factor: float,
    high_freq_factor: float,
    beta_fast: float,
    beta_slow: float,
    attention_factor: float | None,
) -> tuple[Float[Array, " P"], float]:
    """Angle that each pair turns from one position to the next, float32, and a factor of all cosines and sines.

    With the plain frequencies ``f_i = theta^(-2i/H)`` and ``s = factor``:

    - ``none``: ``f``. ``dynamic``: ``f`` too, for texts within ``max_positions``; see :func:`dynamic_frequencies`.
    - ``linear``: ``f / s``, which is positions divided by s (Chen et al. 2023, https://arxiv.org/abs/2306.15595).
    - ``yarn``: ``f`` for pairs that turn more than ``beta_fast`` times over the original length, ``f / s`` for those
      that turn less than ``beta_slow`` times, a ramp over whole pairs between them. The second value is
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
    original = original_positions or max_positions
    if scaling in ("none", "dynamic"):
        return plain_P, 1.0
    if scaling == "linear":
        return plain_P / factor, 1.0
    if scaling == "yarn":
        stretched_P = _yarn_stretched_share(head_size, theta, original, beta_fast, beta_slow)
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1.0
        return plain_P / factor * stretched_P + plain_P * (1 - stretched_P), attention_factor
    if scaling == "llama3":
        turns_P = plain_P * (original / (2 * math.pi))
        kept_P = jnp.clip((turns_P - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        return plain_P / factor * (1 - kept_P) + plain_P * kept_P, 1.0
    raise ValueError(f"scaling must be 'none', 'linear', 'dynamic', 'yarn' or 'llama3', got {scaling!r}")


def _yarn_stretched_share(
    head_size: int, theta: float, original: int, beta_fast: float, beta_slow: float
) -> Float[Array, " P"]:
    """0 for pairs that keep their frequency, 1 for those whose frequency is divided."""
    if theta <= 1:
        raise ValueError(f"yarn needs frequencies that fall from pair to pair: theta must be above 1, got {theta}")

    def pair_that_turns(turns: float) -> float:
        return head_size * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(beta_slow)), head_size - 1)
    width = last - first or 1  # a step where both are the same pair
    return jnp.clip((jnp.arange(head_size // 2, dtype=jnp.float32) - first) / width, 0, 1)


def dynamic_frequencies(
    lengths: Int[Array, "B T"], *, head_size: int, theta: float, factor: float, max_positions: int
) -> Float[Array, "B T P"]:
    """Frequencies of texts of so many tokens, float32: plain up to ``max_positions``, lower the longer the text.

    Dynamic NTK scaling: ``theta`` grows to ``theta * g^(H / (H - 2))`` with
    ``g = factor * length / max_positions - (factor - 1)``. So pair i is slowed down by ``g^(2i / (H - 2))``: the
    fastest pair not at all, the slowest one g times. All tokens of a text need the same length.

    Described in Peng et al. 2023, https://arxiv.org/abs/2309.00071.
    """
    over = jnp.maximum(lengths - max_positions, 0).astype(jnp.float32)
    growth_BT1 = (1 + factor * over / max_positions)[..., None]
    exponents_P = jnp.arange(0, head_size, 2, dtype=jnp.float32) / max(head_size - 2, 1)
    return rotary_frequencies(head_size, theta)[None, None] * growth_BT1 ** -exponents_P[None, None]

"""From logits to a token: the usual processors, in the order and with the rules of ``transformers``.

B batch, V vocabulary, X stop tokens.
"""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

_STOP_TOKENS_BUCKET = 8
_INT32 = np.iinfo(np.int32)
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)  # devices take smaller numbers for 0
_SIGN_BIT = np.uint32(2**31)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen.

    Attributes:
      temperature: 0 takes the most likely token; otherwise logits are divided by it.
      top_k: only so many most likely tokens stay.
      top_p: only the smallest set of most likely tokens whose probabilities reach this sum stays.
      min_p: only tokens with at least this share of the most likely token's probability stay.
      repetition_penalty: positive logits of tokens in prompt and output are divided by it, negative ones multiplied.
      stop_tokens: ids that end a row.
      seed: of the random numbers; one for the batch, or a tuple with one for each row.

    Raises:
      ValueError: a value is out of its range, or a filter is given that temperature 0 would ignore.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "at least 0 (0 is greedy)", lambda v: v >= 0)
        if self.top_k is not None:
            _integer("top_k", self.top_k, "at least 1; None keeps all tokens", lambda v: v >= 1)
        if self.top_p is not None:
            _number("top_p", self.top_p, "in (0, 1]; None keeps all tokens", lambda v: 0 < v <= 1)
        if self.min_p is not None:
            _number("min_p", self.min_p, "in [0, 1]; None keeps all tokens", lambda v: 0 <= v <= 1)
        _number("repetition_penalty", self.repetition_penalty, "above 0 (1 is none)", lambda v: v > 0)
        object.__setattr__(self, "stop_tokens", _integers("stop_tokens", self.stop_tokens))
        seeds = _integers("seed", self.seed)
        if any(seed >= 2**32 for seed in seeds):
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        object.__setattr__(self, "seed", seeds if isinstance(self.seed, Iterable) else seeds[0])
        if self.temperature == 0:
            for name in ("top_k", "top_p", "min_p"):
                value = getattr(self, name)
                if value is not None:
                    raise ValueError(
                        f"{name}={value} has no effect at temperature 0, which takes the most likely token: "
                        f"give a temperature such as 1.0, or leave {name} out"
                    )


@struct.dataclass
class Sampler:
    """A :class:`SamplingConfig` as a jitted function takes it: numbers are traced, what is switched on is static.

    So another temperature does not compile another program; only another set of processors does.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray
    stop_tokens_X: np.ndarray
    use_temperature: bool = struct.field(pytree_node=False)
    use_top_k: bool = struct.field(pytree_node=False)
    use_top_p: bool = struct.field(pytree_node=False)
    use_min_p: bool = struct.field(pytree_node=False)
    use_repetition_penalty: bool = struct.field(pytree_node=False)

    @classmethod
    def of(cls, config: SamplingConfig) -> Self:
        """Splits the settings into what is traced and what is static."""
        stops = config.stop_tokens
        padding = -len(stops) % _STOP_TOKENS_BUCKET if stops else _STOP_TOKENS_BUCKET

        def number(value: float | None) -> np.ndarray:
            return np.asarray(0.0 if value is None else value, np.float32)

        return cls(
            temperature=number(config.temperature),
            top_k=number(config.top_k),
            top_p=number(config.top_p),
            min_p=number(config.min_p),
            repetition_penalty=number(config.repetition_penalty),
            stop_tokens_X=np.asarray([*stops, *[-1] * padding], np.int32),
            use_temperature=config.temperature != 0,
            use_top_k=config.top_k is not None,
            use_top_p=config.top_p is not None and config.top_p < 1,
            use_min_p=config.min_p is not None and config.min_p > 0,
            use_repetition_penalty=config.repetition_penalty != 1,
        )

    def process(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        """Float32 logits with -inf for tokens that may not be drawn; ``seen_BV`` marks tokens of prompt and output.

        With a temperature they are counted from the largest of their row.
        """
        if self.use_repetition_penalty:
            assert seen_BV is not None
            logits_BV = penalise_repetition(logits_BV, seen_BV, self.repetition_penalty)
        if not self.use_temperature:
            return logits_BV
        # The largest becomes 0 first: divided by a small temperature it would be infinite.
        logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / self.temperature
        if self.use_top_k:
            logits_BV = keep_top_k(logits_BV, self.top_k)
        if self.use_top_p:
            logits_BV = keep_top_p(logits_BV, self.top_p)
        if self.use_min_p:
            logits_BV = keep_min_p(logits_BV, self.min_p)
        return logits_BV

    @property
    def can_stop(self) -> bool:
        """Whether there is any stop token."""
        return bool((self.stop_tokens_X >= 0).any())

    def is_stop(self, tokens_B: jax.Array) -> jax.Array:
        """Whether each token [B] is a stop token."""
        return jnp.any(tokens_B[:, None] == self.stop_tokens_X[None, :], axis=1)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampler: Sampler, seen_BV: jax.Array | None = None) -> jax.Array:
    """Draws one token of each row with the row's own key: int32 [B] from float32 logits [B, V]."""
    logits_BV = sampler.process(logits_BV, seen_BV)
    if not sampler.use_temperature:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def row_keys(seed: int | tuple[int, ...], batch_size: int) -> jax.Array:
    """A key for each row [B]. Rows of one seed differ; a row with a seed of its own depends on nothing else.

    Raises:
      ValueError: there are several seeds, and not one for each row.
    """
    if isinstance(seed, int):
        rows_B = np.arange(batch_size, dtype=np.uint32)
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(np.uint32(seed)), rows_B)
    if len(seed) != batch_size:
        raise ValueError(
            f"seed holds {len(seed)} numbers for {batch_size} rows: give one for each row, or a single one"
        )
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(np.asarray(seed, np.uint32))


def penalise_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: Any) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858.
    """
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, jnp.clip(penalised_BV, -_LARGEST, _LARGEST), logits_BV)


def keep_top_k(logits_BV: jax.Array, k: Any) -> jax.Array:
    """Sets all but the k largest logits to -inf; ties with the k-th stay."""
    return _keep_while_less_above(logits_BV, jnp.ones_like(logits_BV), k)


def keep_top_p(logits_BV: jax.Array, p: Any) -> jax.Array:
    """Keeps tokens whose more likely tokens have less than p of the probability: at least one, and ties with the last.

    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    return _keep_while_less_above(logits_BV, jax.nn.softmax(logits_BV, axis=-1), p)


def keep_min_p(logits_BV: jax.Array, p: Any) -> jax.Array:
    """Keeps tokens with at least p times the probability of the most likely one.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """
    least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _keep_while_less_above(logits_BV: jax.Array, weights_BV: jax.Array, limit: Any) -> jax.Array:
    """Keeps each token if the weights of tokens with larger logits sum to less than the limit.

    The least logit that stays is found digit by digit of its float32 bits: exact, and on a CPU several times faster
    than sorting the vocabulary.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    magnitudes_BV = bits_BV & _INT32.max
    signed_BV = jnp.where(bits_BV < 0, -magnitudes_BV, magnitudes_BV)  # integers in the order of the floats
    keys_BV = jax.lax.bitcast_convert_type(signed_BV, jnp.uint32) ^ _SIGN_BIT

    def next_digit(place: jax.Array, least_B: jax.Array) -> jax.Array:
        unit = jnp.uint32(1) << (28 - 4 * place).astype(jnp.uint32)
        digits_W = jnp.arange(1, 16, dtype=jnp.uint32)
        bounds_BW = least_B[:, None] + (digits_W * unit)[None, :]
        above_BWV = keys_BV[:, None, :] >= bounds_BW[:, :, None]
        sums_BW = jnp.sum(jnp.where(above_BWV, weights_BV[:, None, :], 0.0), axis=-1)
        return least_B + unit * jnp.sum(sums_BW >= limit, axis=-1, dtype=jnp.uint32)

    least_B = jax.lax.fori_loop(0, 8, next_digit, jnp.zeros(logits_BV.shape[0], jnp.uint32))
    return jnp.where(keys_BV < least_B[:, None], -jnp.inf, logits_BV)


def _number(name: str, value: Any, rule: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} must be a number {rule}; got {value!r}")
    if value and not _SMALLEST <= abs(float(value)) <= _LARGEST:
        raise ValueError(
            f"{name} must be a number {rule} that float32 can hold, from {_SMALLEST:.2e} to {_LARGEST:.2e}; "
            f"got {value!r}"
        )


def _integer(name: str, value: Any, rule: str, holds: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not holds(number):
        raise ValueError(f"{name} must be an integer {rule}; got {value!r}")
    return number


def _integers(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        values = [values]
    return tuple(_integer(name, v, "(or several) of at least 0", lambda v: v >= 0) for v in values)

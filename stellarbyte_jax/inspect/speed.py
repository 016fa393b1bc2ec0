"""Measured speed of reading prompts and of generating, by batch size, on the device that there is."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stellarbyte_jax.config.section import require
from stellarbyte_jax.inference.api import generate, warm_up
from stellarbyte_jax.inference.programs import cast_for_inference
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params


@dataclass(frozen=True)
class Speed:
    """Tokens a second of a whole batch, medians over repeats.

    Attributes:
      batch_size: rows.
      prefill: of the prompts.
      decode: of the new tokens.
    """

    batch_size: int
    prefill: float
    decode: float


def measure_speed(
    model: ByteTransformer,
    params: Params,
    batch_sizes: Sequence[int],
    *,
    prompt_length: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
) -> Iterator[Speed]:
    """Greedy generation with random prompts, compiled before it is measured; yields one batch size after the other.

    The weights' values do not matter, so that fresh ones do.

    Args:
      model: the network.
      params: its weights.
      batch_sizes: numbers of rows.
      prompt_length: tokens of each prompt.
      new_tokens: of each row.
      repeats: of which the median is taken.

    Raises:
      ConfigError: a number is not positive.
      ValueError: the model has no positions for so many tokens.
    """
    for name, values in (("batch_sizes", batch_sizes), ("repeats", [repeats]), ("prompt_length", [prompt_length])):
        require(len(values) > 0 and min(values) >= 1, f"{name} must be at least 1, got {list(values)}")
    random = np.random.default_rng(0)
    params = cast_for_inference(model, params)
    for batch_size in batch_sizes:
        prompts = random.integers(0, model.config.vocab_size, (batch_size, prompt_length)).astype(np.int32)
        warm_up(model, params, prompts, max_new_tokens=new_tokens)
        runs = [generate(model, params, prompts, max_new_tokens=new_tokens) for _ in range(repeats)]
        yield Speed(
            batch_size,
            batch_size * prompt_length / statistics.median(run.prefill_seconds for run in runs),
            batch_size * new_tokens / statistics.median(run.decode_seconds for run in runs),
        )

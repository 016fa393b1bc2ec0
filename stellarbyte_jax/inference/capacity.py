"""What fits: lengths of texts, caches, prompts read at once; and how lengths are rounded to few program shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.positions import position_scheme

_SMALLEST_BUCKET = 32
# The host looks at results only between blocks: a long one costs least, the short one ends or streams soon.
LONG_BLOCK = 32
SHORT_BLOCK = 4
_LONGER = (
    "load the model with rope_scaling (a longer max_position_embeddings too with yarn and llama3) or with "
    "sliding_window and sink_tokens, or train one with position_embedding "
    "xpos, which has no limit"
)


@dataclass(frozen=True, eq=False)
class Capacity:
    """The sizes of a call, by which its programs are chosen.

    Attributes:
      max_new_tokens_B: largest number of new tokens of each row, int32 [B].
      prompt_width: width of the array that holds the prompts.
      prefill_chunk: tokens of it that are read at once.
      cache_slots: slots of the cache.
      block_sizes: steps between two looks of the host.
    """

    max_new_tokens_B: np.ndarray
    prompt_width: int
    prefill_chunk: int
    cache_slots: int
    block_sizes: tuple[int, ...]


def capacity_of(
    config: ByteConfig,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    prefill_chunk: int | None,
    short_blocks: bool,
) -> Capacity:
    """What a call with these prompts and settings needs.

    Raises:
      ValueError: not exactly one of ``max_new_tokens`` and ``max_length`` is given, a row has no room for its new
        tokens, or prompts cannot be read in such parts, or not at once.
    """
    limits = limits_of(config)
    new_B = new_token_counts(limits, prompts, max_new_tokens, max_length)
    check_prefill(config, limits, prompts, prefill_chunk)
    lengths_B = np.asarray([prompt.size for prompt in prompts], np.int32)
    width = prompt_width(limits, int(lengths_B.max()), prefill_chunk)
    return Capacity(
        max_new_tokens_B=new_B,
        prompt_width=width,
        prefill_chunk=min(prefill_chunk or width, width),
        cache_slots=cache_slots(config, limits, int((lengths_B + new_B).max())),
        block_sizes=tuple(block_sizes(int(new_B.max()), short=short_blocks)),
    )


class TooLongError(ValueError):
    """A text that the model has no positions for; other settings may give it some."""


class Limits(NamedTuple):
    """What a model's position scheme and layers bound.

    Attributes:
      positions: tokens that a text may have; None where nothing in the model is bound to the length that it was
        trained with. That is so where every layer has a window (or memory) within that length, where the scheme lets
        attention fade with distance, and where the cache is pruned. Linear and dynamic scaling stretch
        ``max_position_embeddings``; with YaRN and Llama-3 scaling it is the stretched length already, as in Hugging
        Face.
      at_once: tokens of a prompt that can be read at once; None for any number.
      extensible: whether other settings would allow longer texts. The original's own positions are counted from the
        middle of the trained length, and bound to it whatever the layers see.
    """

    positions: int | None
    at_once: int | None
    extensible: bool


def limits_of(config: ByteConfig) -> Limits:
    """The limits of a model."""
    scheme = position_scheme(config)
    trained = scheme.max_length
    bounded = all(window is not None and (trained is None or window <= trained) for window in config.windows)
    free = scheme.relative and (bounded or config.cache.recent is not None)
    at_once = None if scheme.longest_row is None else scheme.longest_row - config.memory_slots
    return Limits(None if free else trained, at_once, scheme.relative)


def cache_slots(config: ByteConfig, limits: Limits, length: int) -> int:
    """Slots of a cache for texts of this many tokens, rounded up; windowed layers need no more than their window.

    A pruned cache has as many as it is set to, whatever the texts.
    """
    if config.cache.recent is not None and config.cache.heavy_hitters is not None:
        return config.cache.recent + config.cache.heavy_hitters
    windows = config.windows
    longest = max(w for w in windows if w is not None) if None not in windows else None
    bounds = [n for n in (limits.positions, longest) if n is not None]
    return bucket(length, min(bounds, default=None))


def new_token_counts(
    limits: Limits, prompts: Sequence[np.ndarray], max_new_tokens: int | None, max_length: int | None
) -> np.ndarray:
    """Largest number of new tokens of each row, int32 [B].

    Raises:
      ValueError: not exactly one of the two numbers is given, or a row has no room for its new tokens.
      TooLongError: the model has no room for a row.
    """
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError(
            "give either max_new_tokens (without the prompt) or max_length (with the prompt), "
            f"got {max_new_tokens=} and {max_length=}"
        )
    name, value = ("max_length", max_length) if max_new_tokens is None else ("max_new_tokens", max_new_tokens)
    require_positive(name, value)
    limit = limits.positions
    longer = f", or {_LONGER}" if limits.extensible else ""
    new_tokens = []
    for number, prompt in enumerate(prompts):
        new = max_new_tokens if max_length is None else max_length - prompt.size
        assert new is not None
        if new < 1:
            raise ValueError(
                f"row {number}: the prompt of {prompt.size} tokens leaves no room below max_length={max_length}: "
                "raise max_length, or shorten the prompt"
            )
        if limit is not None and prompt.size >= limit:
            raise TooLongError(
                f"row {number}: the prompt of {prompt.size} tokens is longer than the cache: the model has {limit} "
                f"positions, and one is needed for a new token; keep its last {limit - 1} tokens at most{longer}"
            )
        if limit is not None and prompt.size + new > limit:
            raise TooLongError(
                f"row {number}: {prompt.size} prompt tokens and {new} new ones are longer than the cache: "
                f"the model has {limit} positions in all; give a {name} of at most "
                f"{limit if max_new_tokens is None else limit - prompt.size}, or shorten the prompt{longer}"
            )
        new_tokens.append(new)
    return np.asarray(new_tokens, np.int32)


def check_prefill(config: ByteConfig, limits: Limits, rows: Sequence[np.ndarray], chunk: int | None) -> None:
    """Raises ValueError where prompts cannot be read in parts of ``chunk`` tokens, or cannot without parts."""
    if chunk is not None:
        require_positive("prefill_chunk", chunk)
    longest = max(row.size for row in rows)
    if chunk is not None and chunk < longest and config.rope_scaling.name == "dynamic":
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"a prompt of {longest} tokens is longer than the {config.max_position_embeddings} that the model was "
                "trained with, where rope_scaling dynamic rotates every token by the length of the whole: leave "
                "prefill_chunk out, or take rope_scaling linear or yarn"
            )
    at_once = limits.at_once
    if at_once is not None and at_once < 1:
        raise ValueError(
            f"a memory of {config.memory_slots} slots is longer than the row whose XPos factors floats can hold: a "
            "model with a larger xpos_scale_base or a shorter memory is needed"
        )
    if at_once is not None and min(longest, chunk or longest) > at_once:
        raise ValueError(
            f"XPos reads at most {at_once} tokens of a prompt at once, got {min(longest, chunk or longest)}: give a "
            f"prefill_chunk of at most {at_once}"
        )


def bucket(length: int, limit: int | None) -> int:
    """Rounds a length up to a quarter of its power of two (so by a fifth on average at most), within the limit."""
    if length <= _SMALLEST_BUCKET:
        rounded = _SMALLEST_BUCKET
    else:
        quarter = 1 << (length - 1).bit_length() - 3
        rounded = -(-length // quarter) * quarter
    return rounded if limit is None else min(rounded, limit)


def prompt_width(limits: Limits, longest: int, chunk: int | None) -> int:
    """Width of the array that prompts are padded to: a bucket, or a multiple of the ``chunk`` that is read at once."""
    bounds = [n for n in (limits.positions, limits.at_once) if n is not None and n >= longest]
    rounded = bucket(longest, min(bounds, default=None))
    return rounded if chunk is None or chunk >= rounded else -(-longest // chunk) * chunk


def block_sizes(steps: int, *, short: bool) -> list[int]:
    """Sizes of the blocks that make at least this number of steps: long ones first, unless all are to be short."""
    long = 0 if short else steps // LONG_BLOCK
    return [LONG_BLOCK] * long + [SHORT_BLOCK] * -(-(steps - long * LONG_BLOCK) // SHORT_BLOCK)


def require_positive(name: str, value: object) -> None:
    """Raises ValueError where ``value`` is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

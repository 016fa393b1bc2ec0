"""What a call of generation must satisfy: each rule with one clear error, before anything is compiled."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.generate.engine import longest_prefill, position_limit
from stellarbyte_jax.model.memory import Memory

Prompts = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array
_LONGER = (
    "load the model with rope_scaling (a longer max_position_embeddings too with yarn and llama3) or with "
    "sliding_window and sink_tokens (scripts/generate.py takes them with --set), or train one with position_embedding "
    "xpos, which has no limit"
)


def prompts(tokens: Prompts, vocab_size: int) -> list[np.ndarray]:
    """Each prompt as an int32 vector.

    Raises:
      ValueError: a prompt is empty or holds something else than ids of the vocabulary.
    """
    if isinstance(tokens, np.ndarray | jax.Array):
        if tokens.ndim not in (1, 2):
            raise ValueError(f"tokens must be an array [B, T] or [T], got shape {tokens.shape}")
        rows: list[Any] = [tokens] if tokens.ndim == 1 else list(np.asarray(tokens))
    elif len(tokens) and np.ndim(tokens[0]) == 0:
        rows = [tokens]
    else:
        rows = list(tokens)
    if not rows:
        raise ValueError("tokens holds no prompt: give at least one")
    checked = []
    for number, row in enumerate(rows):
        prompt = np.asarray(row)
        if prompt.size == 0:
            raise ValueError(f"row {number}: the prompt is empty; start it with the tokenizer's bos token")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"row {number}: a prompt must be a list of token ids, got {row!r}")
        wrong = prompt[(prompt < 0) | (prompt >= vocab_size)]
        if wrong.size:
            raise ValueError(
                f"row {number}: token id {wrong[0]} is not in the model's vocabulary of {vocab_size} tokens; "
                "is this the model's tokenizer?"
            )
        checked.append(prompt.astype(np.int32))
    return checked


def budget(
    config: ByteConfig, prompts: list[np.ndarray], max_new_tokens: int | None, max_length: int | None
) -> np.ndarray:
    """Number of new tokens of each row, int32 [B].

    Raises:
      ValueError: not exactly one of the two numbers is given, or a row has no room for its new tokens.
    """
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError(
            "give either max_new_tokens (without the prompt) or max_length (with the prompt), "
            f"got {max_new_tokens=} and {max_length=}"
        )
    name, value = ("max_length", max_length) if max_new_tokens is None else ("max_new_tokens", max_new_tokens)
    positive(name, value)
    limit = position_limit(config)
    longer = "" if config.position_embedding == "stellarbyte" else f", or {_LONGER}"
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
            raise ValueError(
                f"row {number}: the prompt of {prompt.size} tokens is longer than the cache: the model has {limit} "
                f"positions, and one is needed for a new token; keep its last {limit - 1} tokens at most{longer}"
            )
        if limit is not None and prompt.size + new > limit:
            raise ValueError(
                f"row {number}: {prompt.size} prompt tokens and {new} new ones are longer than the cache: "
                f"the model has {limit} positions in all; ask for at most {limit - prompt.size} new tokens, or "
                f"shorten the prompt{longer}"
            )
        new_tokens.append(new)
    return np.asarray(new_tokens, np.int32)


def positive(name: str, value: Any) -> None:
    """Raises ValueError where ``value`` is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def memory(config: ByteConfig, read: Memory | None, batch_size: int) -> None:
    """Raises ValueError where the model cannot use this memory for so many rows."""
    if read is None:
        return
    if not config.has_memory:
        raise ValueError("this model has no memory: set memory.length before training it")
    jax.eval_shape(lambda: read.fit(batch_size, config.memory.batch_policy))


def prefill(config: ByteConfig, rows: Sequence[np.ndarray], chunk: int | None) -> None:
    """Raises ValueError where prompts cannot be read in parts of ``chunk`` tokens, or cannot without parts."""
    if chunk is not None:
        positive("prefill_chunk", chunk)
    longest = max(row.size for row in rows)
    if chunk is not None and chunk < longest and config.rope_scaling.name == "dynamic":
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"a prompt of {longest} tokens is longer than the {config.max_position_embeddings} that the model was "
                "trained with, where rope_scaling dynamic turns every token by the length of the whole: leave "
                "prefill_chunk out, or take rope_scaling linear or yarn"
            )
    at_once = longest_prefill(config)
    if at_once is not None and min(longest, chunk or longest) > at_once:
        raise ValueError(
            f"XPos reads at most {at_once} tokens of a prompt at once, got {min(longest, chunk or longest)}: give a "
            f"prefill_chunk of at most {at_once}"
        )

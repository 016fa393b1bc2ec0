"""A checked call of generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inference.capacity import Capacity, capacity_of
from stellarbyte_jax.inference.sampling import Sampler, SamplingConfig, row_keys
from stellarbyte_jax.model.state.memory import Memory

Prompts = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


@dataclass(frozen=True, eq=False)
class Request:
    """What to generate, for one model; :meth:`make` checks it.

    Attributes:
      prompts: int32 ids of each row.
      capacity: the sizes of the call.
      sampler: how tokens are chosen.
      keys_B: random key of each row.
      pad_token: what follows a row's end.
      log_probs: whether log-probabilities are wanted.
      memory: what the model read before the prompts, a row for each.
    """

    prompts: tuple[np.ndarray, ...]
    capacity: Capacity
    sampler: Sampler
    keys_B: jax.Array
    pad_token: int
    log_probs: bool
    memory: Memory | None

    @classmethod
    def make(
        cls,
        config: ByteConfig,
        tokens: Prompts,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        pad_token: int = 0,
        log_probs: bool = False,
        memory: Memory | None = None,
        prefill_chunk: int | None = None,
        short_blocks: bool = False,
        **sampling: Any,
    ) -> Self:
        """Checks the arguments of ``generate``; ``sampling`` are those of :class:`SamplingConfig`.

        Raises:
          ValueError: as ``generate``.
        """
        prompts = checked_prompts(tokens, config.vocab_size)
        if isinstance(pad_token, bool) or not isinstance(pad_token, int | np.integer):
            raise ValueError(f"pad_token must be a token id, got {pad_token!r}")
        settings = SamplingConfig(**sampling)
        for name, ids in (("pad_token", (pad_token,)), ("stop_tokens", settings.stop_tokens)):
            wrong = [i for i in ids if not 0 <= i < config.vocab_size]
            if wrong:
                raise ValueError(f"{name} {wrong[0]} is not in the vocabulary of {config.vocab_size} tokens")
        check_memory(config, memory, len(prompts))
        return cls(
            prompts=tuple(prompts),
            capacity=capacity_of(
                config,
                prompts,
                max_new_tokens=max_new_tokens,
                max_length=max_length,
                prefill_chunk=prefill_chunk,
                short_blocks=short_blocks,
            ),
            sampler=Sampler.of(settings),
            keys_B=row_keys(settings.seed, len(prompts)),
            pad_token=pad_token,
            log_probs=log_probs,
            memory=memory,
        )

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt, int32 [B]."""
        return np.asarray([prompt.size for prompt in self.prompts], np.int32)


def checked_prompts(tokens: Prompts, vocab_size: int) -> list[np.ndarray]:
    """Each prompt as an int32 vector.

    Raises:
      ValueError: a prompt is empty or holds something else than ids of the vocabulary.
    """
    if isinstance(tokens, np.ndarray | jax.Array):
        if tokens.ndim not in (1, 2):
            raise ValueError(f"tokens must be an array [B, T] or [T], got shape {tokens.shape}")
        rows: list[Any] = [tokens] if tokens.ndim == 1 else list(np.asarray(tokens))
    elif not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise ValueError(f"tokens must be a list of token ids, or one such list for each row; got {tokens!r}")
    elif len(tokens) and not isinstance(tokens[0], Sequence | np.ndarray | jax.Array):
        rows = [tokens]
    else:
        rows = list(tokens)
    if not rows:
        raise ValueError("tokens holds no prompt: give at least one")
    checked = []
    for number, row in enumerate(rows):
        try:
            prompt = np.asarray(row)
        except ValueError:  # of lists that are no rectangle
            prompt = np.asarray(None)
        if prompt.size == 0 and prompt.ndim == 1:
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


def check_memory(config: ByteConfig, read: Memory | None, batch_size: int) -> None:
    """Raises ValueError where the model cannot use this memory for so many rows."""
    if read is None:
        return
    if not config.has_memory:
        raise ValueError("this model has no memory: set memory.length before training it")
    jax.eval_shape(lambda: read.match_batch(batch_size, config.memory.batch_policy))

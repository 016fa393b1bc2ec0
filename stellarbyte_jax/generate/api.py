"""Generation as a user calls it: prompts of token ids in, new token ids out."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from stellarbyte_jax.generate import checks, engine
from stellarbyte_jax.generate.sampling import Sampler, SamplingConfig, row_keys
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.memory import Memory

Prompts = checks.Prompts
NewTokens = list[list[int]]


@dataclass(frozen=True, eq=False)
class Generated:
    """New tokens of a batch, without the prompts.

    Attributes:
      tokens: int32 [B, number of new tokens asked for]; the pad token behind a row's end.
      lengths: int32 [B], new tokens of each row, its stop token included.
      log_probs: float32 like ``tokens``, of each token under the model's own distribution (before temperature,
        penalties and filters), 0 behind a row's end; None where not asked for.
      prefill_seconds: time of the prompts, with compilation where a shape is new.
      decode_seconds: time of all decoding steps, with compilation where a shape is new.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray | None
    prefill_seconds: float
    decode_seconds: float

    @property
    def sequences(self) -> NewTokens:
        """The new tokens of each row without padding."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]

    @property
    def mean_log_probs(self) -> np.ndarray:
        """Mean log-probability of each row's new tokens, float64 [B]; ``exp`` of its negative is the perplexity.

        Raises:
          ValueError: log-probabilities were not asked for.
        """
        if self.log_probs is None:
            raise ValueError("there are no log-probabilities: generate with log_probs=True")
        return self.log_probs.sum(axis=1, dtype=np.float64) / self.lengths


def generate(
    model: ByteTransformer,
    params: dict[str, Any],
    tokens: Prompts,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: int | Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    pad_token: int = 0,
    log_probs: bool = False,
    memory: Memory | None = None,
    prefill_chunk: int | None = None,
    stream: Callable[[NewTokens], object] | None = None,
) -> Generated:
    """Continues prompts; greedy unless a temperature is given.

    A row's result does not depend on the other rows, except that one seed gives each row other random numbers.

    Args:
      model: the network.
      params: its weights, in any floating dtype; see :func:`engine.cast_for_inference` for many calls.
      tokens: one prompt (a flat list or array) or several (a list of lists of any lengths, or an array [B, T]).
      max_new_tokens: number of new tokens of each row; give this or ``max_length``.
      max_length: number of tokens of each row, prompt included.
      temperature: 0 takes the most likely token; 1 samples the model's own distribution.
      top_k: samples only from so many most likely tokens.
      top_p: samples only from the smallest set of most likely tokens whose probabilities reach this sum.
      min_p: samples only from tokens with at least this share of the most likely token's probability.
      repetition_penalty: above 1, tokens of prompt and output become less likely.
      stop_tokens: ids that end a row; the stop token is part of the output.
      seed: of the random numbers; a list with one for each row lets a row be repeated on its own.
      pad_token: fills ``Generated.tokens`` behind a row's end.
      log_probs: whether to return log-probabilities.
      memory: what a model with memory read before the prompts, a row for each; see :func:`remember`.
      prefill_chunk: reads prompts in parts of so many tokens, for prompts whose attention does not fit at once.
      stream: called after every few steps with each row's new tokens; generation ends early where it returns True.

    Raises:
      ValueError: a prompt is empty, holds ids outside of the vocabulary, or does not fit into the model with the new
        tokens; a setting is out of its range; or settings do not go together with the model.
    """
    request = _Request(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        pad_token=pad_token,
        log_probs=log_probs,
        memory=memory,
        prefill_chunk=prefill_chunk,
        short_blocks=stream is not None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_tokens=stop_tokens,
        seed=seed,
    )
    began = time.perf_counter()
    params, state = request.start(params)
    prefilled = time.perf_counter()
    blocks = []
    for block in request.blocks(params, state):
        blocks.append(block)
        if stream is not None and stream(_new_tokens(block)) is True:
            break
    blocks = jax.device_get(blocks)
    decoded = time.perf_counter()
    return request.collect(blocks, prefilled - began, decoded - prefilled)


def stream_generate(
    model: ByteTransformer,
    params: dict[str, Any],
    tokens: Prompts,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    pad_token: int = 0,
    **sampling: Any,
) -> Iterator[NewTokens]:
    """Yields each row's new tokens every few steps; the settings are those of :func:`generate`.

    Raises:
      ValueError: as :func:`generate`, at the call and not at the first step.
    """
    request = _Request(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        pad_token=pad_token,
        short_blocks=True,
        **sampling,
    )

    def blocks() -> Iterator[NewTokens]:
        for block in request.blocks(*request.start(params)):
            yield _new_tokens(block)

    return blocks()


def remember(
    model: ByteTransformer,
    params: dict[str, Any],
    tokens: Prompts,
    *,
    segment_length: int,
    memory: Memory | None = None,
) -> Memory:
    """Reads texts segment by segment, as in training, and returns what the model remembers of them.

    Args:
      model: one with ``config.memory``.
      params: its weights.
      tokens: as for :func:`generate`, of any lengths.
      segment_length: tokens read at once; that of training, ``data.sequence_length``, is best.
      memory: what was read before; nothing where it is not given.

    Raises:
      ValueError: the model has no memory, or ``memory`` is of another number of rows and its policy is strict.
    """
    checks.positive("segment_length", segment_length)
    prompts = checks.prompts(tokens, model.config.vocab_size)
    params = engine.cast_for_inference(model, params)
    read = Memory.create(model.config, len(prompts)) if memory is None else memory
    checks.memory(model.config, read, len(prompts))
    for at in range(0, max(p.size for p in prompts), segment_length):
        tokens_BT = np.zeros((len(prompts), segment_length), np.int32)
        lengths_B = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[at : at + segment_length]
            tokens_BT[row, : part.size], lengths_B[row] = part, part.size
        read = engine.read_segment(model, params, tokens_BT, lengths_B, read)
    return read


def warm_up(
    model: ByteTransformer, params: dict[str, Any], tokens: Prompts, *, stream: bool = False, **settings: Any
) -> float:
    """Compiles what :func:`generate` with the same arguments needs, and returns the seconds that it took.

    It runs the prompts and one block of each kind. ``stream`` says whether the call will have a ``stream``.
    """
    began = time.perf_counter()
    request = _Request(model, tokens, short_blocks=stream, **settings)
    params, state = request.start(params)
    jax.block_until_ready(list(request.blocks(params, state, warm_up=True)))
    return time.perf_counter() - began


class _Request:
    """A checked call: what to generate, for one model."""

    def __init__(
        self,
        model: ByteTransformer,
        tokens: Prompts,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        pad_token: int = 0,
        log_probs: bool = False,
        memory: Memory | None = None,
        prefill_chunk: int | None = None,
        short_blocks: bool,
        **sampling: Any,
    ) -> None:
        vocab_size = model.config.vocab_size
        self.model = model
        self.prompts = checks.prompts(tokens, vocab_size)
        self.budget_B = checks.budget(model.config, self.prompts, max_new_tokens, max_length)
        settings = SamplingConfig(**sampling)
        for name, ids in (("pad_token", (pad_token,)), ("stop_tokens", settings.stop_tokens)):
            wrong = [i for i in ids if not 0 <= i < vocab_size]
            if wrong:
                raise ValueError(f"{name} {wrong[0]} is not in the vocabulary of {vocab_size} tokens")
        self.sampler = Sampler.of(settings)
        self.keys_B = row_keys(settings.seed, len(self.prompts))
        self.pad_token = pad_token
        self.log_probs = log_probs
        self.memory = memory
        checks.memory(model.config, memory, len(self.prompts))
        checks.prefill(model.config, self.prompts, prefill_chunk)
        self.prefill_chunk = prefill_chunk
        self.sizes = engine.block_sizes(int(self.budget_B.max()), short=short_blocks)

    def start(self, params: dict[str, Any]) -> tuple[dict[str, Any], engine.Decoding]:
        """Casts the weights and runs the prompts."""
        params = engine.cast_for_inference(self.model, params)
        return params, engine.start(
            self.model,
            params,
            self.prompts,
            self.budget_B,
            self.sampler,
            self.pad_token,
            self.memory,
            self.prefill_chunk,
        )

    def blocks(
        self, params: dict[str, Any], state: engine.Decoding, *, warm_up: bool = False
    ) -> Iterator[engine.Block]:
        """Decodes to the end, or one block of each size."""
        return engine.run(
            self.model,
            params,
            state,
            self.keys_B,
            self.sampler,
            self.budget_B,
            self.pad_token,
            sizes=list(dict.fromkeys(self.sizes)) if warm_up else self.sizes,
            log_probs=self.log_probs,
        )

    def collect(self, blocks: list[engine.Block], prefill_seconds: float, decode_seconds: float) -> Generated:
        """Joins blocks, cut or padded to the width asked for."""
        width = int(self.budget_B.max())

        def join(parts: list[Any], fill: Any) -> np.ndarray:
            joined = np.concatenate(parts, axis=1)[:, :width]
            return np.pad(joined, ((0, 0), (0, width - joined.shape[1])), constant_values=fill)

        active = join([b.active_BX for b in blocks], False)
        return Generated(
            tokens=join([b.tokens_BX for b in blocks], self.pad_token),
            lengths=active.sum(axis=1, dtype=np.int32),
            log_probs=join([b.log_probs_BX for b in blocks], 0.0) if self.log_probs else None,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
        )


def _new_tokens(block: engine.Block) -> NewTokens:
    tokens, active = np.asarray(block.tokens_BX), np.asarray(block.active_BX)
    return [row[keep].tolist() for row, keep in zip(tokens, active, strict=True)]

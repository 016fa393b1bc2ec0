"""Generation as a user calls it: prompts of token ids in, new token ids out."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from stellarbyte_jax.inference import capacity, programs
from stellarbyte_jax.inference.bank import AdapterBank, Choices
from stellarbyte_jax.inference.request import Prompts, Request, check_memory, checked_prompts
from stellarbyte_jax.model.decoder import ByteTransformer, Params
from stellarbyte_jax.model.state.memory import Memory
from stellarbyte_jax.model.trees import merge
from stellarbyte_jax.sharding import on_host

NewTokens = list[list[int]]
Weights = Params | AdapterBank


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
    params: Weights,
    tokens: Prompts,
    *,
    adapter: Choices = None,
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
      params: its weights, in any floating dtype; see :func:`programs.cast_for_inference` for many calls, and
        :func:`programs.split_layers` for many tokens. Or a bank of them and of adapters.
      tokens: one prompt (a flat list or array) or several (a list of lists of any lengths, or an array [B, T]).
      adapter: of the bank, for all rows or a list with one for each: a name, ``{name: weight}`` for a sum of several,
        or None for the weights alone; see :meth:`bank.AdapterBank.chosen`.
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
        tokens; a setting is out of its range; settings do not go together with the model; or the bank has no such
        adapter.
    """
    request = Request.make(
        model.config,
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
    model, params = _network(model, params, adapter, len(request.prompts))
    decoding = programs.start(model, params, request)
    prefilled = time.perf_counter()
    blocks = []
    for block in programs.run(model, params, request, decoding, request.capacity.block_sizes):
        blocks.append(block)
        if stream is not None and stream(_new_tokens(block)) is True:
            break
    blocks = on_host(blocks)
    decoded = time.perf_counter()
    return _collect(request, blocks, prefilled - began, decoded - prefilled)


def stream_generate(
    model: ByteTransformer, params: Weights, tokens: Prompts, *, adapter: Choices = None, **settings: Any
) -> Iterator[NewTokens]:
    """Yields each row's new tokens every few steps; the settings are those of :func:`generate`.

    Raises:
      ValueError: as :func:`generate`, at the call and not at the first step.
    """
    request = Request.make(model.config, tokens, short_blocks=True, **settings)
    network, cast = _network(model, params, adapter, len(request.prompts))

    def blocks() -> Iterator[NewTokens]:
        decoding = programs.start(network, cast, request)
        for block in programs.run(network, cast, request, decoding, request.capacity.block_sizes):
            yield _new_tokens(block)

    return blocks()


def remember(
    model: ByteTransformer,
    params: Weights,
    tokens: Prompts,
    *,
    segment_length: int,
    memory: Memory | None = None,
    adapter: Choices = None,
) -> Memory:
    """Reads texts segment by segment, as in training, and returns what the model remembers of them.

    Args:
      model: one with ``config.memory``.
      params: its weights, or a bank.
      tokens: as for :func:`generate`, of any lengths.
      segment_length: tokens read at once; that of training, ``data.sequence_length``, is best.
      memory: what was read before; nothing where it is not given.
      adapter: as for :func:`generate`.

    Raises:
      ValueError: the model has no memory, ``memory`` is of another number of rows and its policy is strict, or the bank
        has no such adapter.
    """
    capacity.require_positive("segment_length", segment_length)
    prompts = checked_prompts(tokens, model.config.vocab_size)
    model, params = _network(model, params, adapter, len(prompts))
    read = Memory.create(model.config, len(prompts)) if memory is None else memory
    check_memory(model.config, read, len(prompts))
    for at in range(0, max(p.size for p in prompts), segment_length):
        tokens_BT = np.zeros((len(prompts), segment_length), np.int32)
        lengths_B = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[at : at + segment_length]
            tokens_BT[row, : part.size], lengths_B[row] = part, part.size
        read = programs.read_segment(model, params, tokens_BT, lengths_B, read)
    return read


def warm_up(
    model: ByteTransformer,
    params: Weights,
    tokens: Prompts,
    *,
    stream: bool = False,
    adapter: Choices = None,
    **settings: Any,
) -> float:
    """Compiles what :func:`generate` with the same arguments needs, and returns the seconds that it took.

    It runs the prompts and one block of each kind. ``stream`` says whether the call will have a ``stream``.
    """
    began = time.perf_counter()
    request = Request.make(model.config, tokens, short_blocks=stream, **settings)
    model, params = _network(model, params, adapter, len(request.prompts))
    decoding = programs.start(model, params, request)
    sizes = list(dict.fromkeys(request.capacity.block_sizes))
    jax.block_until_ready(list(programs.run(model, params, request, decoding, sizes)))
    return time.perf_counter() - began


def _network(model: ByteTransformer, params: Weights, adapter: Choices, rows: int) -> tuple[ByteTransformer, Params]:
    """The network that computes the rows of a call, and its weights in the compute dtype."""
    if isinstance(params, AdapterBank):
        network, adapters = params.chosen(model, adapter, rows)
        return network, merge(adapters, programs.cast_for_inference(model, params.params))
    if adapter is not None:
        raise ValueError("adapter names one of a bank: give an AdapterBank in place of the weights")
    return model, programs.cast_for_inference(model, params)


def _collect(
    request: Request, blocks: list[programs.Block], prefill_seconds: float, decode_seconds: float
) -> Generated:
    """Joins blocks, cut or padded to the width asked for."""
    width = int(request.capacity.max_new_tokens_B.max())

    def join(parts: list[Any], fill: float) -> np.ndarray:
        joined = np.concatenate(parts, axis=1)[:, :width]
        return np.pad(joined, ((0, 0), (0, width - joined.shape[1])), constant_values=fill)

    active = join([b.active_BX for b in blocks], False)
    return Generated(
        tokens=join([b.tokens_BX for b in blocks], request.pad_token),
        lengths=active.sum(axis=1, dtype=np.int32),
        log_probs=join([b.log_probs_BX for b in blocks], 0.0) if request.log_probs else None,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
    )


def _new_tokens(block: programs.Block) -> NewTokens:
    tokens, active = on_host(block.tokens_BX), on_host(block.active_BX)
    return [row[keep].tolist() for row, keep in zip(tokens, active, strict=True)]

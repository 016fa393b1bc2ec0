"""The two compiled programs of generation: prefill of the prompts, and blocks of decoding steps.

Lengths that enter a program's shapes are rounded up to buckets, so that the number of programs stays bounded: for one
batch size and one set of processors, one prefill for each pair of buckets and two decoding programs for each cache.
Prompts in parts need two programs for each cache: of the first part and of the others.

B batch, T prompt positions, S cache slots, V vocabulary, X steps of a block.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.generate.sampling import Sampler, sample
from stellarbyte_jax.model.cache import first_position, make_cache
from stellarbyte_jax.model.decoder import ByteTransformer, forward_step, head_kernel, logits
from stellarbyte_jax.model.memory import Memory
from stellarbyte_jax.ops.rotary import longest_xpos_row

_SMALLEST_BUCKET = 32
# The host looks at results only between blocks: a long one costs least, the short one ends or streams soon.
LONG_BLOCK = 32
SHORT_BLOCK = 4


@struct.dataclass
class Decoding:
    """What a decoding step needs and changes.

    Attributes:
      cache: keys and values of all tokens but the next.
      logits_BV: float32, of the next token.
      seen_BV: which tokens occur in prompt and output; None without a repetition penalty.
      done_B: rows that have ended.
      step: int32, number of tokens generated.
    """

    cache: Any
    logits_BV: jax.Array
    seen_BV: jax.Array | None
    done_B: jax.Array
    step: jax.Array


@struct.dataclass
class Block:
    """Tokens of some steps.

    Attributes:
      tokens_BX: int32, the pad token where a row had ended.
      active_BX: False where a row had ended before the step.
      log_probs_BX: float32, of each token under the model's own distribution; None where not asked for.
    """

    tokens_BX: jax.Array
    active_BX: jax.Array
    log_probs_BX: jax.Array | None


def bucket(length: int, limit: int | None) -> int:
    """Rounds a length up to a quarter of its power of two (so by a fifth on average at most), within the limit."""
    if length <= _SMALLEST_BUCKET:
        rounded = _SMALLEST_BUCKET
    else:
        quarter = 1 << (length - 1).bit_length() - 3
        rounded = -(-length // quarter) * quarter
    return rounded if limit is None else min(rounded, limit)


def position_limit(config: ByteConfig) -> int | None:
    """How many tokens a text may have; None where nothing in the model is bound to the length that it was trained with.

    That is so where every layer has a window (or memory), where XPos lets attention fade with distance, and where the
    cache is pruned. Linear and dynamic scaling stretch ``max_position_embeddings``; with YaRN and Llama-3 scaling it
    is the stretched length already, as in Hugging Face. The original's own positions are counted from the middle of
    the trained length, and bound to it whatever the layers see.
    """
    if config.position_embedding == "stellarbyte":
        return config.max_position_embeddings
    if all(kind.window is not None for kind in config.layer_kinds) or config.position_embedding == "xpos":
        return None
    if config.cache.recent is not None:
        return None
    stretched = config.rope_scaling.factor if config.rope_scaling.name in ("linear", "dynamic") else 1.0
    return int(config.max_position_embeddings * stretched)


def cache_slots(config: ByteConfig, length: int) -> int:
    """Slots of a cache for texts of this many tokens, rounded up; windowed layers need no more than their window.

    A pruned cache has as many as it is set to, whatever the texts.
    """
    if config.cache.recent is not None and config.cache.heavy_hitters is not None:
        return config.cache.recent + config.cache.heavy_hitters
    windows = [kind.window for kind in config.layer_kinds]
    longest = max(w for w in windows if w is not None) if None not in windows else None
    limits = [n for n in (position_limit(config), longest) if n is not None]
    return bucket(length, min(limits, default=None))


def longest_prefill(config: ByteConfig) -> int | None:
    """How many tokens of a prompt can be read at once; XPos factors of longer rows would overflow."""
    if config.position_embedding != "xpos":
        return None
    return longest_xpos_row(config.xpos_scale_base) - first_position(config)


def prompt_width(config: ByteConfig, longest: int, chunk: int | None) -> int:
    """Width of the array that prompts are padded to: a bucket, or a multiple of the ``chunk`` that is read at once."""
    limits = [n for n in (position_limit(config), longest_prefill(config)) if n is not None and n >= longest]
    rounded = bucket(longest, min(limits, default=None))
    return rounded if chunk is None or chunk >= rounded else -(-longest // chunk) * chunk


def block_sizes(steps: int, *, short: bool) -> list[int]:
    """Sizes of the blocks that make at least this number of steps: long ones first, unless all are to be short."""
    long = 0 if short else steps // LONG_BLOCK
    return [LONG_BLOCK] * long + [SHORT_BLOCK] * -(-(steps - long * LONG_BLOCK) // SHORT_BLOCK)


def cast_for_inference(model: ByteTransformer, params: dict[str, Any]) -> dict[str, Any]:
    """The weights in the compute dtype, as every layer would cast them, so that no result changes.

    Scales of norms and XPos rates stay as they are. Worth doing once before many calls: :func:`generate` does it in
    each.
    """
    return _cast(params, model.config.compute_dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key in ("scale", "xpos_rate") else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def prefill(
    model: ByteTransformer,
    params: dict[str, Any],
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    memory: Memory | None,
    *,
    cache_length: int,
) -> tuple[jax.Array, Any]:
    """Runs prompts, padded on the right to T, through the model.

    Returns:
      float32 logits [B, V] of the token after each prompt, and a cache of ``cache_length`` slots with the prompts.
    """
    cache = make_cache(model.config, tokens_BT.shape[0], cache_length)
    return _read(model, params, tokens_BT, lengths_B, cache, memory)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("logits_BV", "cache"))
def prefill_more(
    model: ByteTransformer,
    params: dict[str, Any],
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    logits_BV: jax.Array,
    cache: Any,
) -> tuple[jax.Array, Any]:
    """Runs the next part of prompts, none of a row whose length is 0; such rows keep their logits."""
    more_BV, cache = _read(model, params, tokens_BT, lengths_B, cache, None)
    return jnp.where(lengths_B[:, None] > 0, more_BV, logits_BV), cache


@functools.partial(jax.jit, static_argnames="model")
def read_segment(
    model: ByteTransformer, params: dict[str, Any], tokens_BT: jax.Array, lengths_B: jax.Array, memory: Memory
) -> Memory:
    """The memory after another segment, padded on the right; rows of length 0 keep theirs."""
    T = tokens_BT.shape[1]
    real_BT = jnp.arange(T, dtype=jnp.int32)[None, :] < lengths_B[:, None]
    segment_ids = real_BT.astype(jnp.int32)
    applied: Any = model.apply({"params": params}, tokens_BT, segment_ids=segment_ids, memory=memory, head=False)
    return applied[1]


def _read(model, params, tokens_BT, lengths_B, cache, memory) -> tuple[jax.Array, Any]:
    applied: Any = model.apply({"params": params}, tokens_BT, cache=cache, memory=memory, lengths=lengths_B, head=False)
    hidden_BTD, cache = applied
    # The head on the last positions alone: logits of all would take B x T x V floats.
    last_B = jnp.maximum(lengths_B - 1, 0)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    return logits(model.config, head_kernel(model.config, params), last_BD), cache


@functools.partial(jax.jit, static_argnames=("model", "steps", "log_probs"), donate_argnames="state")
def decode_block(
    model: ByteTransformer,
    params: dict[str, Any],
    state: Decoding,
    keys_B: jax.Array,
    sampler: Sampler,
    budget_B: jax.Array,
    pad_token: jax.Array,
    *,
    steps: int,
    log_probs: bool,
) -> tuple[Decoding, Block]:
    """Generates ``steps`` tokens of each row; ``state`` is donated.

    A row ends with its first stop token, or its ``budget_B``-th token. The number of steps is static, since a loop that
    tests on the device whether to go on makes the host wait in every step.
    """
    rows_B = jnp.arange(budget_B.shape[0], dtype=jnp.int32)

    def step(state: Decoding, _: None) -> tuple[Decoding, Block]:
        with jax.named_scope("sample"):
            step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.step)
            drawn_B = sample(state.logits_BV, step_keys_B, sampler, state.seen_BV)
            active_B = ~state.done_B
            tokens_B = jnp.where(active_B, drawn_B, pad_token)
            scores_B = None
            if log_probs:
                chosen_B = jnp.take_along_axis(state.logits_BV, tokens_B[:, None], axis=1)[:, 0]
                scores_B = jnp.where(active_B, chosen_B - jax.nn.logsumexp(state.logits_BV, axis=-1), 0.0)
            seen_BV = state.seen_BV
            if seen_BV is not None:
                seen_BV = seen_BV.at[rows_B, tokens_B].set(True)
            done_B = state.done_B | sampler.is_stop(tokens_B) | (state.step + 1 >= budget_B)
        logits_BV, cache = forward_step(model, params, tokens_B, state.cache)
        return Decoding(cache, logits_BV, seen_BV, done_B, state.step + 1), Block(tokens_B, active_B, scores_B)

    state, block = jax.lax.scan(step, state, length=steps)
    return state, jax.tree.map(jnp.transpose, block)


def run(
    model: ByteTransformer,
    params: dict[str, Any],
    state: Decoding,
    keys_B: jax.Array,
    sampler: Sampler,
    budget_B: np.ndarray,
    pad_token: int,
    *,
    sizes: list[int],
    log_probs: bool,
) -> Iterator[Block]:
    """Decodes blocks of these sizes, or fewer when every row has ended. What a row has too much is not active.

    Without stop tokens nothing is read between blocks, and the device never waits for the host.
    """
    pad = np.asarray(pad_token, np.int32)
    for steps in sizes:
        state, block = decode_block(
            model, params, state, keys_B, sampler, budget_B, pad, steps=steps, log_probs=log_probs
        )
        yield block
        if sampler.can_stop and np.asarray(state.done_B).all():
            return


def start(
    model: ByteTransformer,
    params: dict[str, Any],
    prompts: list[np.ndarray],
    budget_B: np.ndarray,
    sampler: Sampler,
    pad_token: int,
    memory: Memory | None = None,
    prefill_chunk: int | None = None,
) -> Decoding:
    """Prefills ragged prompts with room for ``budget_B`` more tokens in each row, and waits for it."""
    config = model.config
    lengths_B = np.asarray([p.size for p in prompts], np.int32)
    longest = int(lengths_B.max())
    T = prompt_width(config, longest, prefill_chunk)
    tokens_BT = np.full((len(prompts), T), pad_token, np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: prompt.size] = prompt
    S = cache_slots(config, int((lengths_B + budget_B).max()))
    C = min(prefill_chunk or T, T)
    parts = [np.clip(lengths_B - at, 0, C) for at in range(0, T, C)]
    logits_BV, cache = prefill(model, params, tokens_BT[:, :C], parts[0], memory, cache_length=S)
    for number, part_B in enumerate(parts[1:], 1):
        part_BT = tokens_BT[:, number * C : number * C + C]
        logits_BV, cache = prefill_more(model, params, part_BT, part_B, logits_BV, cache)
    seen_BV = None
    if sampler.use_repetition_penalty:
        seen = np.zeros((len(prompts), config.vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        seen_BV = jnp.asarray(seen)
    logits_BV.block_until_ready()
    return Decoding(cache, logits_BV, seen_BV, jnp.asarray(budget_B <= 0), jnp.zeros((), jnp.int32))

"""The two compiled programs of generation: prefill of the prompts, and blocks of decoding steps.

Lengths that enter a program's shapes are rounded up to buckets, so that the number of programs stays bounded: for one
batch size and one set of processors, one prefill for each pair of buckets and two decoding programs for each cache.

B batch, T prompt positions, S cache slots, V vocabulary, X steps of a block.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from stellarbyte_jax.generate.sampling import Sampler, sample
from stellarbyte_jax.model.cache import KVCache
from stellarbyte_jax.model.decoder import ByteTransformer, forward_step, head_kernel

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

    cache: KVCache
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


def bucket(length: int, limit: int) -> int:
    """Rounds a length up to a quarter of its power of two (so by a fifth on average at most), within the limit."""
    if length <= _SMALLEST_BUCKET:
        return min(_SMALLEST_BUCKET, limit)
    quarter = 1 << (length - 1).bit_length() - 3
    return min(-(-length // quarter) * quarter, limit)


def block_sizes(steps: int, *, short: bool) -> list[int]:
    """Sizes of the blocks that make at least this number of steps: long ones first, unless all are to be short."""
    long = 0 if short else steps // LONG_BLOCK
    return [LONG_BLOCK] * long + [SHORT_BLOCK] * -(-(steps - long * LONG_BLOCK) // SHORT_BLOCK)


def cast_for_inference(model: ByteTransformer, params: dict[str, Any]) -> dict[str, Any]:
    """The weights in the compute dtype, as every layer would cast them, so that no result changes.

    Scales of norms stay as they are. Worth doing once before many calls: :func:`generate` does it in each.
    """
    return _cast(params, model.config.compute_dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def prefill(
    model: ByteTransformer, params: dict[str, Any], tokens_BT: jax.Array, lengths_B: jax.Array, cache_length: int
) -> tuple[jax.Array, KVCache]:
    """Runs prompts, padded on the right to T, through the model.

    Returns:
      float32 logits [B, V] of the token after each prompt, and a cache of ``cache_length`` slots with the prompts.
    """
    cache = KVCache.create(model.config, tokens_BT.shape[0], cache_length)
    applied: Any = model.apply({"params": params}, tokens_BT, cache=cache, lengths=lengths_B, head=False)
    hidden_BTD, cache = applied
    # The head on the last positions alone: logits of all would take B x T x V floats.
    last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    kernel_DV = head_kernel(model.config, params).astype(last_BD.dtype)
    return jnp.einsum("BD,DV->BV", last_BD, kernel_DV, preferred_element_type=jnp.float32), cache


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
) -> Decoding:
    """Prefills ragged prompts with room for ``budget_B`` more tokens in each row, and waits for it."""
    config = model.config
    lengths_B = np.asarray([p.size for p in prompts], np.int32)
    limit = config.max_position_embeddings
    T = bucket(int(lengths_B.max()), limit)
    tokens_BT = np.full((len(prompts), T), pad_token, np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: prompt.size] = prompt
    S = bucket(int((lengths_B + budget_B).max()), limit)
    logits_BV, cache = prefill(model, params, tokens_BT, lengths_B, S)
    seen_BV = None
    if sampler.use_repetition_penalty:
        seen = np.zeros((len(prompts), config.vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        seen_BV = jnp.asarray(seen)
    logits_BV.block_until_ready()
    return Decoding(cache, logits_BV, seen_BV, jnp.asarray(budget_B <= 0), jnp.zeros((), jnp.int32))

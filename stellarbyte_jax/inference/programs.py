"""The two compiled programs of generation: prefill of the prompts, and blocks of decoding steps.

Lengths that enter a program's shapes are rounded up to buckets, so that the number of programs stays bounded: for one
batch size and one set of processors, one prefill for each pair of buckets and two decoding programs for each cache.
Prompts in parts need two programs for each cache: of the first part and of the others.

B batch, T prompt positions, S cache slots, V vocabulary, X steps of a block.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from stellarbyte_jax.inference.request import Request
from stellarbyte_jax.inference.sampling import Sampler, sample
from stellarbyte_jax.model.decoder import ByteTransformer, Params, forward, forward_step, logits, param_uses
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.layers import layers_are_apart, with_layers_apart
from stellarbyte_jax.model.params import WeightUse, materialise
from stellarbyte_jax.model.state.memory import Memory
from stellarbyte_jax.sharding import on_host


@struct.dataclass
class Decoding:
    """What a decoding step needs and changes.

    Attributes:
      state: the model's, with keys and values of all tokens but the next.
      logits_BV: float32, of the next token.
      seen_BV: which tokens occur in prompt and output; None without a repetition penalty.
      done_B: rows that have ended.
      step: int32, number of tokens generated.
    """

    state: State
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


def cast_for_inference(model: ByteTransformer, params: Params) -> Params:
    """The weights in the compute dtype, as every layer would cast them, so that no result changes.

    What is used in float32 (scales of norms, XPos rates) stays as it is. Worth doing once before many calls:
    :func:`generate` does it in each. Layers that are apart have been cast.
    """
    return params if layers_are_apart(params) else _cast(model, params)


def split_layers(model: ByteTransformer, params: Params) -> Params:
    """The weights of :func:`cast_for_inference` as arrays of their own for each layer, for :func:`generate`.

    On a GPU a decoding step reads them where they are; those of a stack it copies in each step, but for some products.
    They are copies themselves, so that there must be memory for both until the others are let go, and programs with
    them take longer to compile, for they have no loop over layers.
    """
    return _split(cast_for_inference(model, params))


_split = jax.jit(with_layers_apart)


@functools.partial(jax.jit, static_argnames="model")
def _cast(model: ByteTransformer, params: Params) -> Params:
    def cast(use: WeightUse, leaf: jax.Array) -> jax.Array:
        return leaf if use.float32 else materialise(leaf, model.config.compute_dtype)

    return jax.tree.map(cast, param_uses(model), params)


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def prefill(
    model: ByteTransformer,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    memory: Memory | None,
    *,
    cache_length: int,
) -> tuple[jax.Array, State]:
    """Runs prompts, padded on the right to T, through the model.

    Returns:
      float32 logits [B, V] of the token after each prompt, and the state: a cache of ``cache_length`` slots with the
      prompts.
    """
    state = State.empty(model.config, tokens_BT.shape[0], cache_length, memory)
    return _read(model, params, tokens_BT, lengths_B, state)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("logits_BV", "state"))
def prefill_more(
    model: ByteTransformer,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    logits_BV: jax.Array,
    state: State,
) -> tuple[jax.Array, State]:
    """Runs the next part of prompts, none of a row whose length is 0; such rows keep their logits."""
    more_BV, state = _read(model, params, tokens_BT, lengths_B, state)
    return jnp.where(lengths_B[:, None] > 0, more_BV, logits_BV), state


@functools.partial(jax.jit, static_argnames="model")
def read_segment(
    model: ByteTransformer, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, memory: Memory
) -> Memory:
    """The memory after another segment, padded on the right; rows of length 0 keep theirs."""
    T = tokens_BT.shape[1]
    valid_mask_BT = jnp.arange(T, dtype=jnp.int32)[None, :] < lengths_B[:, None]
    segment_ids = valid_mask_BT.astype(jnp.int32)
    after = forward(model, params, Inputs(tokens_BT, segment_ids_BT=segment_ids), State(memory=memory)).state.memory
    assert after is not None
    return after


def _read(
    model: ByteTransformer, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, state: State
) -> tuple[jax.Array, State]:
    out = forward(model, params, Inputs(tokens_BT, lengths_B=lengths_B), state)
    # The head on the last positions alone: logits of all would take B x T x V floats.
    last_B = jnp.maximum(lengths_B - 1, 0)
    last_BD = jnp.take_along_axis(out.hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    return logits(model, params, last_BD), out.state


@functools.partial(jax.jit, static_argnames=("model", "steps", "log_probs"), donate_argnames="decoding")
def decode_block(
    model: ByteTransformer,
    params: Params,
    decoding: Decoding,
    keys_B: jax.Array,
    sampler: Sampler,
    max_new_tokens_B: jax.Array,
    pad_token: jax.Array,
    *,
    steps: int,
    log_probs: bool,
) -> tuple[Decoding, Block]:
    """Generates ``steps`` tokens of each row; ``decoding`` is donated.

    A row ends with its first stop token, or with its ``max_new_tokens_B``-th one. The number of steps is static, since
    a loop that tests on the device whether to go on makes the host wait in every step.
    """

    def step(now: Decoding, _: None) -> tuple[Decoding, Block]:
        with jax.named_scope("sample"):
            step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, now.step)
            drawn_B = sample(now.logits_BV, step_keys_B, sampler, now.seen_BV)
            active_B = ~now.done_B
            tokens_B = jnp.where(active_B, drawn_B, pad_token)
            scores_B = None
            if log_probs:
                chosen_B = jnp.take_along_axis(now.logits_BV, tokens_B[:, None], axis=1)[:, 0]
                scores_B = jnp.where(active_B, chosen_B - jax.nn.logsumexp(now.logits_BV, axis=-1), 0.0)
            seen_BV = now.seen_BV
            if seen_BV is not None:
                seen_BV = jax.vmap(lambda seen_V, token: seen_V.at[token].set(True))(seen_BV, tokens_B)
            done_B = now.done_B | sampler.is_stop(tokens_B) | (now.step + 1 >= max_new_tokens_B)
        logits_BV, state = forward_step(model, params, tokens_B, now.state)
        return Decoding(state, logits_BV, seen_BV, done_B, now.step + 1), Block(tokens_B, active_B, scores_B)

    decoding, block = jax.lax.scan(step, decoding, length=steps)
    return decoding, jax.tree.map(jnp.transpose, block)


def run(
    model: ByteTransformer, params: Params, request: Request, decoding: Decoding, sizes: Sequence[int]
) -> Iterator[Block]:
    """Decodes blocks of these sizes, or fewer when every row has ended; tokens past a row's end are marked inactive.

    Without stop tokens nothing is read between blocks, and the device never waits for the host.
    """
    pad = np.asarray(request.pad_token, np.int32)
    for steps in sizes:
        decoding, block = decode_block(
            model,
            params,
            decoding,
            request.keys_B,
            request.sampler,
            request.capacity.max_new_tokens_B,
            pad,
            steps=steps,
            log_probs=request.log_probs,
        )
        yield block
        if request.sampler.can_stop and on_host(decoding.done_B).all():
            return


def start(model: ByteTransformer, params: Params, request: Request) -> Decoding:
    """Prefills ragged prompts with room for the new tokens of each row, and waits for it."""
    sizes, lengths_B = request.capacity, request.prompt_lengths
    T, C = sizes.prompt_width, sizes.prefill_chunk
    tokens_BT = np.full((len(request.prompts), T), request.pad_token, np.int32)
    for row, prompt in zip(tokens_BT, request.prompts, strict=True):
        row[: prompt.size] = prompt
    parts = [np.clip(lengths_B - at, 0, C) for at in range(0, T, C)]
    logits_BV, state = prefill(
        model, params, tokens_BT[:, :C], parts[0], request.memory, cache_length=sizes.cache_slots
    )
    for number, part_B in enumerate(parts[1:], 1):
        part_BT = tokens_BT[:, number * C : number * C + C]
        logits_BV, state = prefill_more(model, params, part_BT, part_B, logits_BV, state)
    seen_BV = None
    if request.sampler.use_repetition_penalty:
        seen = np.zeros((len(request.prompts), model.config.vocab_size), bool)
        for row, prompt in zip(seen, request.prompts, strict=True):
            row[prompt] = True
        seen_BV = jnp.asarray(seen)
    logits_BV.block_until_ready()
    done_B = jnp.zeros(len(request.prompts), bool)
    return Decoding(state, logits_BV, seen_BV, done_B, jnp.zeros((), jnp.int32))

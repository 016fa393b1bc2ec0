"""Log-likelihoods of continuations.

B contexts, R rows, T tokens, W context tokens, M continuation tokens, D model, V vocabulary, C tokens of a chunk.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.config import CacheConfig
from stellarbyte_jax.evaluation.batches import Shared, Whole, batches
from stellarbyte_jax.evaluation.texts import Pair
from stellarbyte_jax.model.decoder import ByteTransformer, Params, forward, logits
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.sharding import on_host

Likelihood = tuple[float, bool]
Scores = tuple[jax.Array, jax.Array]
_LOGITS = 2**26  # that exist at once, in float32


def log_likelihoods(
    model: ByteTransformer,
    params: Params,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    max_length: int,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """For each pair the natural logarithm of the continuation's probability, and whether greedy decoding makes it.

    ``sum_i log p(continuation_i | context, continuation_<i)``. Settings of the cache (``config.cache``) have no part in
    it: the caches here hold every token in the compute dtype.

    Args:
      model: the network.
      params: its weights, best as :func:`programs.cast_for_inference` makes them.
      pairs: what is scored.
      batch_size: continuations of one call.
      max_length: tokens that the model reads at once; what is longer loses its beginning.
      progress: called with the number of pairs that were scored since the last call.

    Raises:
      ValueError: a continuation alone is longer than ``max_length``.
    """
    model = ByteTransformer(replace(model.config, cache=CacheConfig()))
    kept = [_shortened(pair, max_length) for pair in pairs]
    found: list[Likelihood] = [(0.0, False)] * len(kept)

    def collect(batch: Whole | Shared, scores: Scores) -> None:
        log_probs_RM, greedy_RM = on_host(scores)
        counts_RM = batch.targets_RM >= 0
        sums_R = np.where(counts_RM, log_probs_RM.astype(np.float64), 0.0).sum(axis=1)
        hits_R = np.asarray(np.all(greedy_RM | ~counts_RM, axis=1))
        for row, number in enumerate(batch.numbers):
            found[number] = float(sums_R[row]), bool(hits_R[row])
        progress(len(batch.numbers))

    computing: tuple[Whole | Shared, Scores] | None = None  # read after the next one was dispatched
    for batch in batches(kept, batch_size, max_length):
        dispatched = batch, _dispatch(model, params, batch)
        if computing is not None:
            collect(*computing)
        computing = dispatched
    if computing is not None:
        collect(*computing)
    return found


def _shortened(pair: Pair, max_length: int) -> Pair:
    context, continuation = pair
    if len(continuation) > max_length:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens, and the model reads {max_length}: leave that document out "
            "of the task, or give the model more positions (--set rope_scaling.name=yarn rope_scaling.factor=4)"
        )
    return Pair(context[max(0, len(context) + len(continuation) - max_length - 1) :], continuation)


def _dispatch(model: ByteTransformer, params: Params, batch: Whole | Shared) -> Scores:
    if isinstance(batch, Whole):
        return _score_whole(model, params, batch.tokens_RT, batch.first_R, batch.targets_RM)
    return _score_shared(model, params, batch.contexts_BW, batch.lengths_B, batch.owners_R, batch.targets_RM)


@functools.partial(jax.jit, static_argnames="model")
def _score_whole(
    model: ByteTransformer, params: Params, tokens_RT: jax.Array, first_R: jax.Array, targets_RM: jax.Array
) -> Scores:
    """Log-probabilities [R, M] of targets from position ``first_R`` on, and whether each is the likeliest token."""
    hidden_RTD = forward(model, params, Inputs(tokens_RT)).hidden_BTD
    offsets_1M = jnp.arange(targets_RM.shape[1], dtype=jnp.int32)[None, :]
    # Behind a short continuation there may be no token; its targets do not count there.
    at_RM = jnp.minimum(first_R[:, None] + offsets_1M, tokens_RT.shape[1] - 1)
    hidden_RMD = jnp.take_along_axis(hidden_RTD, at_RM[:, :, None], axis=1)
    return _target_scores(model, params, hidden_RMD, targets_RM)


@functools.partial(jax.jit, static_argnames="model")
def _score_shared(
    model: ByteTransformer,
    params: Params,
    contexts_BW: jax.Array,
    lengths_B: jax.Array,
    owners_R: jax.Array,
    targets_RM: jax.Array,
) -> Scores:
    """The same for continuations whose contexts are read once: ``targets_RM`` holds each from its first token on."""
    B, W = contexts_BW.shape
    M = targets_RM.shape[1] - 1
    state = State.empty(model.config, B, W + M)
    out = forward(model, params, Inputs(contexts_BW, lengths_B=lengths_B), state)
    last_BD = jnp.take_along_axis(out.hidden_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    with jax.named_scope("first_token"):
        logits_BV = logits(model, params, last_BD)
        log_z_B, best_B = jax.nn.logsumexp(logits_BV, axis=-1), jnp.argmax(logits_BV, axis=-1)
        log_probs_R = logits_BV[owners_R, jnp.maximum(targets_RM[:, 0], 0)] - log_z_B[owners_R]
        greedy_R = (best_B[owners_R] == targets_RM[:, 0]) & ~jnp.isnan(log_probs_R)
    if M == 0:
        return log_probs_R[:, None], greedy_R[:, None]
    assert out.state.cache is not None
    later_RM = targets_RM[:, 1:]
    counts_R = jnp.sum(later_RM >= 0, axis=1, dtype=jnp.int32)
    inputs = Inputs(jnp.maximum(targets_RM[:, :-1], 0), lengths_B=counts_R)
    out = forward(model, params, inputs, out.state.select(owners_R))
    log_probs_RM, greedy_RM = _target_scores(model, params, out.hidden_BTD, later_RM)
    return (
        jnp.concatenate([log_probs_R[:, None], log_probs_RM], axis=1),
        jnp.concatenate([greedy_R[:, None], greedy_RM], axis=1),
    )


def _target_scores(
    model: ByteTransformer, params: Params, hidden_RMD: jax.Array, targets_RM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target behind its hidden state, and whether it is the likeliest token."""
    R, M, D = hidden_RMD.shape
    chunks = -(-R * M * model.config.padded_vocab_size // _LOGITS)
    C = -(-R * M // chunks)
    more = chunks * C - R * M
    hidden_SCD = jnp.pad(hidden_RMD.reshape(R * M, D), ((0, more), (0, 0))).reshape(chunks, C, D)
    targets_SC = jnp.pad(targets_RM.reshape(R * M), (0, more)).reshape(chunks, C)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> Scores:
        hidden_CD, targets_C = chunk
        logits_CV = logits(model, params, hidden_CD)
        wanted_C1 = jnp.maximum(targets_C, 0)[:, None]
        of_targets_C1 = jnp.take_along_axis(logits_CV, wanted_C1, axis=1)
        # What argmax says, the first of equals, in one pass: XLA's argmax takes longer than the product on a CPU.
        later_CV = jnp.arange(logits_CV.shape[1])[None, :] >= wanted_C1
        greedy_C = jnp.all((logits_CV < of_targets_C1) | ((logits_CV == of_targets_C1) & later_CV), axis=1)
        return of_targets_C1[:, 0] - jax.nn.logsumexp(logits_CV, axis=-1), greedy_C

    log_probs_SC, greedy_SC = jax.lax.map(of_chunk, (hidden_SCD, targets_SC))
    return tuple(x.reshape(-1)[: R * M].reshape(R, M) for x in (log_probs_SC, greedy_SC))  # type: ignore[return-value]

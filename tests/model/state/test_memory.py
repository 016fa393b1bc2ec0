"""Segment memory: equal to one long pass, without gradients, of one document only, carried exactly."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE, init, run, run_on, some_tokens, step

from stellarbyte_jax.config import LossConfig, MemoryConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.memory import LayerMemory, Memory
from stellarbyte_jax.training.loss import batch_loss

M = 6
KINDS = {
    "rope": {},
    "xpos, grouped, parallel": {"position_embedding": "xpos", "xpos_scale_base": 8.0, "parallel_residual": True},
    "deepnorm": {"residual_scaling": "deepnorm"},
    "experts": {"moe": {"num_experts": 4, "intermediate_size": 16}},
    "experts behind a dense layer, one shared": {
        "moe": {"num_experts": 4, "intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1}
    },
}


def make(length=M, memory=None, **settings):
    memory = MemoryConfig(length=length, **(memory or {}))
    plain = dataclasses.replace(BASE, **settings)
    return ByteTransformer(dataclasses.replace(plain, memory=memory)), weights_of(plain)


@functools.cache
def weights_of(config):
    # Larger weights make attention choose; post-norm ones begin large.
    factor = np.float32(1 if config.residual_scaling == "deepnorm" else 3)
    return jax.tree.map(lambda x: jax.device_put(factor * np.asarray(x)), init(ByteTransformer(config)))


# Most tests call the programs of the same shapes: two rows of 24 tokens, and of segments of 8.
TOKENS = np.asarray(some_tokens(2, 24))


def whole(model, params, *rows):
    """Logits of rows of up to 24 tokens without earlier ones; what follows them changes none."""
    return np.asarray(run(model, params, np.stack([np.pad(row, (0, 24 - len(row))) for row in rows])))


def in_segments(model, params, tokens, length, memory=None, **more):
    memory = Memory.create(model.config, tokens.shape[0]) if memory is None else memory
    parts = []
    for at in range(0, tokens.shape[1], length):
        cut = {name: x[:, at : at + length] for name, x in more.items()}
        out, state = run_on(model, params, tokens[:, at : at + length], memory=memory, **cut)
        memory = state.memory
        parts.append(out)
    return np.concatenate(parts, axis=1), memory


@pytest.mark.parametrize(("kind", "length"), [("rope", 4), *((kind, 8) for kind in KINDS)])
def test_segments_equal_one_pass(kind, length):
    """Segments shorter and longer than the memory."""
    model, params = make(**KINDS[kind])
    full = whole(model, params, *TOKENS)
    found, memory = in_segments(model, params, TOKENS, length)
    np.testing.assert_allclose(found, full, atol=3e-5)
    np.testing.assert_array_equal(memory.lengths_B, [24, 24])
    alone = [in_segments(model, params, TOKENS[:, at : at + length], length)[0] for at in range(0, 24, length)]
    assert np.abs(np.concatenate(alone, axis=1) - full)[:, length:].max() > 1e-3


def test_each_layer_has_its_own_length():
    model, params = make(length=(3, 0, 7, 0))
    tokens = some_tokens(4, 16)
    out, memory = in_segments(model, params, tokens, 8)
    assert memory.slots == (3, 0, 7, 0)
    places = enumerate(memory.groups[0])
    only_first = memory.replace(groups=(tuple(LayerMemory(x.states, x.valid_BM & (i == 0)) for i, x in places),))
    a, b = (run_on(model, params, tokens[:, :8], memory=m)[0] for m in (memory, only_first))
    assert np.abs(a - b).max() > 1e-4
    assert np.all(np.isfinite(out))


def loss_after(model, weights, tokens, memory):
    out = forward(model, weights, Inputs(tokens), State(memory=memory))
    return jnp.sum(jnp.square(out.hidden_BTD) * jnp.arange(BASE.hidden_size, dtype=jnp.float32)[None, None])


def test_no_gradient_reaches_the_memory():
    model, params = make()
    tokens = some_tokens(1, 16)

    def loss(table, past_counts):
        weights = {**params, "embed": {"embedding": table}}
        memory = forward(
            model, weights, Inputs(tokens[:, :8]), State(memory=Memory.create(model.config, 1))
        ).state.memory
        if not past_counts:
            memory = jax.lax.stop_gradient(memory)
        return loss_after(model, weights, tokens[:, 8:], memory)

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    table = params["embed"]["embedding"]
    np.testing.assert_array_equal(slope(table, True), slope(table, False))
    # The weights that read the memory do learn from it.
    _, memory = in_segments(model, params, tokens[:, :8], 8)
    of_weights = jax.jit(jax.grad(lambda weights, memory: loss_after(model, weights, tokens[:, 8:], memory)))
    a, b = (of_weights(params, m)["layers"]["0"]["attn"]["k"] for m in (memory, memory.reset()))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("length", [4, 8])
def test_a_document_does_not_see_the_one_before(length):
    """Row 0 goes on, row 1 begins anew at the segment's edge, row 2 in the middle of a segment."""
    model, params = make()
    tokens = some_tokens(3, 24)
    starts = [0, 8, 14]
    positions = np.stack([np.r_[np.arange(s), np.arange(24 - s)] for s in starts]).astype(np.int32)
    segments = np.ones((3, 24), np.int32)
    segments[2, 14:16] = 2  # ids count within a segment: the one that ends with token 15 holds two documents
    found, memory = in_segments(model, params, tokens, length, positions_BT=positions, segment_ids_BT=segments)
    np.testing.assert_array_equal(memory.lengths_B, [24, 16, 10])
    alone = whole(model, params, *(np.asarray(tokens)[row, start:] for row, start in enumerate(starts)))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found[row, start:], alone[row, : 24 - start], atol=3e-5)


def test_memory_and_cache_are_one_view():
    """Prefill behind a memory, then single tokens: as if all had been one text."""
    model, params = make(**KINDS["xpos, grouped, parallel"])
    tokens, full = TOKENS, whole(model, params, *TOKENS)
    _, memory = in_segments(model, params, tokens[:, :8], 8)
    logits, state = run_on(model, params, tokens[:, 8:13], memory=memory, cache=make_cache(model.config, 2, 16))
    assert state.memory is None
    np.testing.assert_allclose(logits, full[:, 8:13], atol=3e-5)
    for at in range(13, 24):
        logits, state = step(model, params, tokens[:, at], state)
        np.testing.assert_allclose(logits, full[:, at], atol=3e-5)


def test_a_memory_that_is_not_full_leaves_no_trace_in_the_cache():
    """Row 0 has read four tokens of its document, row 1 none: what the other slots hold is not to be seen."""
    model, params = make()
    tokens = TOKENS
    _, memory = in_segments(model, params, tokens[:, :4], 4)
    (place,) = memory.groups[0]
    states = jnp.where(place.valid_BM[None, :, :, None], place.states, 7.0)
    junk = memory.replace(groups=((place.replace(states=states),),))
    alone = junk.reset(jnp.asarray([False, True]))
    full = whole(model, params, tokens[0], tokens[1, 4:])
    logits, state = run_on(model, params, tokens[:, 4:6], memory=alone, cache=make_cache(model.config, 2, 16))
    logits = np.asarray(logits)[:, -1]
    for at in range(6, 13):
        np.testing.assert_allclose(logits[0], full[0, at - 1], atol=3e-5)
        np.testing.assert_allclose(logits[1], full[1, at - 5], atol=3e-5)
        logits, state = step(model, params, tokens[:, at], state)


def test_compressed_slots_are_means_of_what_left():
    """Recent and compressed slots against plain numpy, over four segments."""
    F, S, T, w = 2, 4, 6, 0.6
    model, _ = make(length=F + S, memory={"recent_share": S / (F + S), "compression_weight": w})
    layers, D = BASE.num_hidden_layers, BASE.hidden_size
    random = np.random.default_rng(0)
    memory = Memory.create(model.config, 1)
    update = jax.jit(lambda memory, new: memory.update(model.config, ((new,),), None, T))
    compressed, seen = None, np.zeros((layers, 1, 0, D), np.float32)
    for number in range(4):
        new = random.normal(size=(layers, 1, T, D)).astype(np.float32)
        before = min(S, seen.shape[2])
        seen = np.concatenate([seen, new], axis=2)
        memory = update(memory, new)
        leaving = seen[:, :, -S - T : -S] if number else seen[:, :, :-S]
        padded = np.full((layers, 1, T, D), np.nan, np.float32)  # empty slots leave first
        padded[:, :, T - leaving.shape[2] :] = leaving
        assert number or before == 0
        means = (
            np.stack([np.nanmean(padded[:, :, half], axis=2) for half in (slice(0, 3), slice(3, 6))], 2)
            if (number)
            else np.stack([np.full((layers, 1, D), np.nan), np.nanmean(padded[:, :, 3:], axis=2)], 2)
        )
        compressed = (
            means if compressed is None else np.where(np.isnan(compressed), means, w * compressed + (1 - w) * means)
        )
        (place,) = memory.groups[0]
        np.testing.assert_allclose(place.states[:, :, F:], seen[:, :, -S:], atol=1e-6)
        np.testing.assert_array_equal(place.valid_BM[0, :F], ~np.isnan(compressed[0, 0, :, 0]))
        np.testing.assert_allclose(place.states[:, :, :F], np.nan_to_num(compressed), atol=1e-5)


def test_compressed_slots_reach_further_than_the_window():
    model, params = make(length=8, memory={"recent_share": 0.5})
    texts = np.stack([TOKENS[0], TOKENS[0]])
    texts[1, :4] = (texts[1, :4] + 1) % BASE.vocab_size
    ends = in_segments(model, params, texts, 8)[0][:, -1]
    assert np.abs(ends[0] - ends[1]).max() > 1e-5
    narrow = in_segments(*make(length=4), texts, 8)[0]
    assert np.abs(narrow[0, 8] - narrow[1, 8]).max() > 1e-6  # windows of 4 layers reach 16 tokens back
    np.testing.assert_array_equal(narrow[0, -1], narrow[1, -1])


def test_compressed_memory_goes_into_the_cache_too():
    model, params = make(length=8, memory={"recent_share": 0.5})
    tokens = TOKENS
    _, memory = in_segments(model, params, tokens[:, :16], 8)
    expected = np.asarray(run_on(model, params, tokens[:, 16:24], memory=memory)[0])
    _, state = run_on(model, params, tokens[:, 16:18], memory=memory, cache=make_cache(model.config, 2, 16))
    for at in range(2, 5):
        logits, state = step(model, params, tokens[:, 16 + at], state)
        np.testing.assert_allclose(logits, expected[:, at], atol=3e-5)


def test_batches_of_another_size():
    model, params = make(memory={"batch_policy": "strict"})
    tokens = some_tokens(4, 8)
    _, memory = in_segments(model, params, tokens[:2], 8)
    with pytest.raises(ValueError, match=r"2 rows, the batch 4.*memory.select"):
        run_on(model, params, tokens, memory=memory)
    np.testing.assert_array_equal(memory.match_batch(2, "strict").groups[0][0].states, memory.groups[0][0].states)
    for policy, rows in (("select", [0, 1, 0, 1]), ("repeat", [0, 0, 1, 1])):
        np.testing.assert_array_equal(
            memory.match_batch(4, policy).groups[0][0].states, memory.groups[0][0].states[:, np.array(rows)]
        )
    np.testing.assert_array_equal(
        memory.match_batch(1, "select").groups[0][0].states, memory.groups[0][0].states[:, :1]
    )
    with pytest.raises(ValueError, match="no multiple"):
        memory.match_batch(3, "repeat")
    repeating, _ = make(memory={"batch_policy": "repeat"})
    assert run_on(repeating, params, tokens, memory=memory)[1].memory.batch_size == 4


def test_split_and_joined_rows():
    model, params = make(length=(3, 0, 7, 0))
    _, memory = in_segments(model, params, some_tokens(4, 8), 8)
    for part, index in zip(range(2), (slice(0, None, 2), slice(1, None, 2)), strict=True):
        cut = jax.tree.map(lambda x, part=part: x[part], memory.split(2))
        np.testing.assert_array_equal(cut.groups[0][2].states, memory.groups[0][2].states[:, index])
        np.testing.assert_array_equal(cut.groups[0][2].valid_BM, memory.groups[0][2].valid_BM[index])
    back = memory.split(2).joined()
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loss_carries_it():
    model, params = make()
    tokens = TOKENS[:, :16]
    state = State(memory=Memory.create(model.config, 2))
    sums, program = [], jax.jit(partial(batch_loss, model, loss=LossConfig()))
    for at in (0, 8):
        batch = {
            "tokens": tokens[:, at : at + 8],
            "positions": np.broadcast_to(np.arange(at, at + 8, dtype=np.int32), (2, 8)),
            "segment_ids": np.ones((2, 8), np.int32),
        }
        total, _, out = program(params, batch, state=state)
        state = out.state
        sums.append(float(total))
    logits = whole(model, params, *tokens)[:, :16]
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), tokens[:, 1:, None], 2)[..., 0]
    assert sums[0] == pytest.approx(nll[:, :7].sum(), rel=1e-5)
    assert sums[1] == pytest.approx(nll[:, 8:].sum(), rel=1e-5)


def test_a_memory_that_does_not_belong_here_is_refused():
    model, params = make()
    memory = Memory.create(model.config, 1)
    _, state = run_on(model, params, some_tokens(1, 4), cache=make_cache(model.config, 1, 8))
    with pytest.raises(ValueError, match="give a new cache"):
        run_on(model, params, some_tokens(1, 4), cache=state.cache, memory=memory)
    plain = ByteTransformer(BASE)
    with pytest.raises(ValueError, match="has no memory"):
        run_on(plain, init(plain), some_tokens(1, 4), memory=memory)


def test_compressed_slots_of_the_document_before_are_forgotten():
    """The new document begins in the middle of a segment, or at its edge."""
    model, params = make(length=8, memory={"recent_share": 0.5})
    tokens = TOKENS
    _, before = in_segments(model, params, tokens[:, :16], 8)
    assert np.all(before.groups[0][0].valid_BM)
    segments = jax.device_put(np.asarray([[1] * 3 + [2] * 5] * 2, np.int32))
    positions = jax.device_put(np.asarray([[16, 17, 18, 0, 1, 2, 3, 4]] * 2, np.int32))
    given = {"positions_BT": positions, "segment_ids_BT": segments}
    _, state = run_on(model, params, tokens[:, 16:24], memory=before, **given)
    (found,) = state.memory.groups[0]
    np.testing.assert_array_equal(found.valid_BM, [[False, False, False, True] + [True] * 4] * 2)
    _, alone = run_on(model, params, tokens[:, 19:24], memory=Memory.create(model.config, 2))
    (expected,) = alone.memory.groups[0]
    after, alone = (np.asarray(x.states)[:, :, 3:] for x in (found, expected))
    np.testing.assert_allclose(after, alone, atol=3e-5)
    np.testing.assert_array_equal(found.valid_BM, expected.valid_BM)
    # At a segment's edge the first position says so, and slots that begin empty are filled without the old ones.
    ends = [
        run_on(
            model, params, tokens[:, 16:24], memory=m, positions_BT=jax.device_put(np.asarray([range(8)] * 2, np.int32))
        )
        for m in (before, Memory.create(model.config, 2))
    ]
    np.testing.assert_allclose(ends[0][0], ends[1][0], atol=3e-5)
    (found,), (expected,) = (end.memory.groups[0] for _, end in ends)
    np.testing.assert_array_equal(found.valid_BM, expected.valid_BM)
    valid = np.asarray(found.valid_BM)[0]
    found, expected = (np.asarray(x.states)[:, :, valid] for x in (found, expected))
    np.testing.assert_allclose(found, expected, atol=3e-5)

"""Segment memory: equal to one long pass, without gradients, of one document only, carried exactly."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import BASE, run, some_tokens

from stellarbyte_jax.config import LossConfig, MemoryConfig
from stellarbyte_jax.model.cache import KVCache
from stellarbyte_jax.model.decoder import ByteTransformer, forward_step, init_params
from stellarbyte_jax.model.memory import Memory
from stellarbyte_jax.train.loss import batch_loss

M = 6
KINDS = {
    "rope": {},
    "xpos, grouped, parallel": {"position_embedding": "xpos", "xpos_scale_base": 8.0, "parallel_residual": True},
    "deepnorm": {"residual_scaling": "deepnorm"},
}


@partial(jax.jit, static_argnums=0)
def weights_of(model):
    return init_params(model, jax.random.key(0))


def make(length=M, memory=None, **settings):
    memory = MemoryConfig(length=length, **(memory or {}))
    model = ByteTransformer(dataclasses.replace(BASE, memory=memory, **settings))
    # Larger weights make attention choose; post-norm ones begin large.
    factor = 1 if settings.get("residual_scaling") == "deepnorm" else 3
    return model, jax.tree.map(lambda x: factor * x, weights_of(model))


def in_segments(model, params, tokens, length, memory=None, **more):
    memory = Memory.create(model.config, tokens.shape[0]) if memory is None else memory
    parts = []
    for at in range(0, tokens.shape[1], length):
        cut = {name: x[:, at : at + length] for name, x in more.items()}
        out, memory = run(model, params, tokens[:, at : at + length], memory=memory, **cut)
        parts.append(out)
    return jnp.concatenate(parts, axis=1), memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [4, 8])
def test_segments_equal_one_pass(kind, length):
    """Segments shorter and longer than the memory."""
    model, params = make(**KINDS[kind])
    tokens = some_tokens(2, 24)
    full = run(model, params, tokens)
    found, memory = in_segments(model, params, tokens, length)
    np.testing.assert_allclose(found, full, atol=3e-5)
    np.testing.assert_array_equal(memory.lengths, [24, 24])
    forgetful = jnp.concatenate([run(model, params, tokens[:, at : at + length]) for at in range(0, 24, length)], 1)
    assert np.abs(forgetful - full)[:, length:].max() > 1e-3


def test_each_layer_has_its_own_length():
    model, params = make(length=(3, 0, 7, 0))
    tokens = some_tokens(2, 16)
    out, memory = in_segments(model, params, tokens, 8)
    assert [x.shape[2] for x in memory.states] == [3, 0, 7, 0]
    only_first = memory.replace(valid=tuple(v & (i == 0) for i, v in enumerate(memory.valid)))
    a, b = (run(model, params, tokens[:, :4], memory=m)[0] for m in (memory, only_first))
    assert np.abs(a - b).max() > 1e-4
    assert np.all(np.isfinite(out))


def test_no_gradient_reaches_the_memory():
    model, params = make()
    tokens = some_tokens(1, 16)

    def loss(table, past_counts):
        weights = {**params, "embed": {"embedding": table}}
        _, memory = model.apply({"params": weights}, tokens[:, :8], memory=Memory.create(model.config, 1))
        if not past_counts:
            memory = jax.lax.stop_gradient(memory)
        return jnp.sum(jnp.square(model.apply({"params": weights}, tokens[:, 8:], memory=memory)[0]))

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    table = params["embed"]["embedding"]
    np.testing.assert_array_equal(slope(table, True), slope(table, False))
    # The weights that read the memory do learn from it.
    _, memory = run(model, params, tokens[:, :8], memory=Memory.create(model.config, 1))

    def k_slope(memory):
        def of(k):
            layers = {"0": {**params["layers"]["0"], "attn": {**params["layers"]["0"]["attn"], "k": k}}}
            out, _ = model.apply({"params": {**params, "layers": layers}}, tokens[:, 8:], memory=memory)
            return jnp.sum(jnp.square(out))

        return jax.jit(jax.grad(of))(params["layers"]["0"]["attn"]["k"])

    assert np.abs(k_slope(memory) - k_slope(memory.reset())).max() > 1e-3


@pytest.mark.parametrize("length", [4, 8])
def test_a_document_does_not_see_the_one_before(length):
    """Row 0 goes on, row 1 begins anew at the segment's edge, row 2 in the middle of a segment."""
    model, params = make()
    tokens = some_tokens(3, 24)
    starts = [0, 8, 14]
    positions = np.stack([np.r_[np.arange(s), np.arange(24 - s)] for s in starts]).astype(np.int32)
    segments = np.ones((3, 24), np.int32)
    segments[2, 14:16] = 2  # ids count within a segment: the one that ends with token 15 holds two documents
    found, memory = in_segments(model, params, tokens, length, positions=positions, segment_ids=segments)
    np.testing.assert_array_equal(memory.lengths, [24, 16, 10])
    for row, start in enumerate(starts):
        alone = run(model, params, tokens[row : row + 1, start:])
        np.testing.assert_allclose(found[row, start:], alone[0], atol=3e-5)


def test_memory_and_cache_are_one_view():
    """Prefill behind a memory, then single tokens: as if all had been one text."""
    model, params = make(position_embedding="xpos", xpos_scale_base=8.0)
    tokens = some_tokens(2, 24)
    full = run(model, params, tokens)
    _, memory = in_segments(model, params, tokens[:, :8], 8)
    logits, cache = run(model, params, tokens[:, 8:13], memory=memory, cache=KVCache.create(model.config, 2, 16))
    np.testing.assert_allclose(logits, full[:, 8:13], atol=3e-5)
    step = jax.jit(lambda t, c: forward_step(model, params, t, c))
    for at in range(13, 24):
        logits, cache = step(tokens[:, at], cache)
        np.testing.assert_allclose(logits, full[:, at], atol=3e-5)


def test_a_memory_that_is_not_full_leaves_no_trace_in_the_cache():
    """Row 0 has read three tokens of its document, row 1 none: what the other slots hold is not to be seen."""
    model, params = make()
    tokens = some_tokens(2, 12)
    _, memory = in_segments(model, params, tokens[:, :3], 3)
    junk = memory.replace(
        states=tuple(jnp.where(v[None, :, :, None], x, 7.0) for x, v in zip(memory.states, memory.valid, strict=True))
    )
    alone = junk.reset(jnp.asarray([False, True]))
    full = run(model, params, tokens)[0], run(model, params, tokens[:, 3:])[1]
    logits, cache = run(model, params, tokens[:, 3:5], memory=alone, cache=KVCache.create(model.config, 2, 16))
    for at in range(5, 12):
        np.testing.assert_allclose(logits[0, -1], full[0][at - 1], atol=3e-5)
        np.testing.assert_allclose(logits[1, -1], full[1][at - 4], atol=3e-5)
        logits, cache = run(model, params, tokens[:, at : at + 1], cache=cache)


def test_fused_slots_are_means_of_what_left():
    """Sliding and fused halves against plain numpy, over four segments."""
    F, S, T, w = 2, 4, 6, 0.6
    model, _ = make(length=F + S, memory={"sliding_share": S / (F + S), "fusion_weight": w})
    layers, D = BASE.num_hidden_layers, BASE.hidden_size
    random = np.random.default_rng(0)
    memory = Memory.create(model.config, 1)
    fused, seen = None, np.zeros((layers, 1, 0, D), np.float32)
    for number in range(4):
        new = random.normal(size=(layers, 1, T, D)).astype(np.float32)
        before = min(S, seen.shape[2])
        seen = np.concatenate([seen, new], axis=2)
        memory = memory.update(model.config, (jnp.asarray(new),), None, T)
        leaving = seen[:, :, -S - T : -S] if number else seen[:, :, :-S]
        padded = np.full((layers, 1, T, D), np.nan, np.float32)  # empty slots leave first
        padded[:, :, T - leaving.shape[2] :] = leaving
        assert number or before == 0
        means = (
            np.stack([np.nanmean(padded[:, :, half], axis=2) for half in (slice(0, 3), slice(3, 6))], 2)
            if (number)
            else np.stack([np.full((layers, 1, D), np.nan), np.nanmean(padded[:, :, 3:], axis=2)], 2)
        )
        fused = means if fused is None else np.where(np.isnan(fused), means, w * fused + (1 - w) * means)
        np.testing.assert_allclose(memory.states[0][:, :, F:], seen[:, :, -S:], atol=1e-6)
        np.testing.assert_array_equal(memory.valid[0][0, :F], ~np.isnan(fused[0, 0, :, 0]))
        np.testing.assert_allclose(memory.states[0][:, :, :F], np.nan_to_num(fused), atol=1e-5)


def test_fused_slots_reach_further_than_the_window():
    model, params = make(length=8, memory={"sliding_share": 0.5})
    tokens = some_tokens(1, 24)
    other = tokens.at[0, :4].set((tokens[0, :4] + 1) % BASE.vocab_size)
    ends = [in_segments(model, params, t, 8)[0][0, -1] for t in (tokens, other)]
    narrow, weights = make(length=4)
    narrow_ends = [in_segments(narrow, weights, t, 8)[0][0, 8] for t in (tokens, other)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-5
    assert np.abs(narrow_ends[0] - narrow_ends[1]).max() > 1e-6  # windows of 4 layers reach 16 tokens back
    last = [in_segments(narrow, weights, t, 8)[0][0, -1] for t in (tokens, other)]
    np.testing.assert_array_equal(*last)


def test_fused_memory_goes_into_the_cache_too():
    model, params = make(length=8, memory={"sliding_share": 0.5})
    tokens = some_tokens(2, 24)
    _, memory = in_segments(model, params, tokens[:, :16], 8)
    expected, _ = run(model, params, tokens[:, 16:20], memory=memory)
    _, cache = run(model, params, tokens[:, 16:18], memory=memory, cache=KVCache.create(model.config, 2, 16))
    for at in range(2):
        logits, cache = run(model, params, tokens[:, 18 + at : 19 + at], cache=cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, 2 + at], atol=3e-5)


def test_batches_of_another_size():
    model, params = make(memory={"batch_policy": "strict"})
    tokens = some_tokens(4, 8)
    _, memory = in_segments(model, params, tokens[:2], 8)
    with pytest.raises(ValueError, match=r"2 rows, the batch 4.*memory.select"):
        run(model, params, tokens, memory=memory)
    np.testing.assert_array_equal(memory.fit(2, "strict").states[0], memory.states[0])
    for policy, rows in (("select", [0, 1, 0, 1]), ("repeat", [0, 0, 1, 1])):
        np.testing.assert_array_equal(memory.fit(4, policy).states[0], memory.states[0][:, np.array(rows)])
    np.testing.assert_array_equal(memory.fit(1, "select").states[0], memory.states[0][:, :1])
    with pytest.raises(ValueError, match="no multiple"):
        memory.fit(3, "repeat")
    repeating, _ = make(memory={"batch_policy": "repeat"})
    assert run(repeating, params, tokens, memory=memory)[1].batch_size == 4


def test_split_and_joined_rows():
    model, params = make(length=(3, 0, 7, 0))
    _, memory = in_segments(model, params, some_tokens(4, 8), 8)
    for part, index in zip(range(2), (slice(0, 2), slice(2, 4)), strict=True):
        cut = jax.tree.map(lambda x, part=part: x[part], memory.split(2))
        np.testing.assert_array_equal(cut.states[2], memory.states[2][:, index])
    back = memory.split(2).joined()
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loss_carries_it():
    model, params = make()
    tokens = np.asarray(some_tokens(2, 16))
    memory = Memory.create(model.config, 2)
    sums = []
    for at in (0, 8):
        batch = {
            "tokens": tokens[:, at : at + 8],
            "positions": np.broadcast_to(np.arange(at, at + 8, dtype=np.int32), (2, 8)),
            "segment_ids": np.ones((2, 8), np.int32),
        }
        total, _, memory = jax.jit(partial(batch_loss, model, loss=LossConfig()))(params, batch, memory=memory)
        sums.append(float(total))
    logits = run(model, params, jnp.asarray(tokens))
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), tokens[:, 1:, None], 2)[..., 0]
    assert sums[0] == pytest.approx(nll[:, :7].sum(), rel=1e-5)
    assert sums[1] == pytest.approx(nll[:, 8:].sum(), rel=1e-5)


def test_misuse_is_refused():
    model, params = make()
    memory = Memory.create(model.config, 1)
    _, cache = run(model, params, some_tokens(1, 4), cache=KVCache.create(model.config, 1, 8))
    with pytest.raises(ValueError, match="give a new cache"):
        run(model, params, some_tokens(1, 4), cache=cache, memory=memory)
    plain = ByteTransformer(BASE)
    with pytest.raises(ValueError, match="has no memory"):
        run(plain, weights_of(plain), some_tokens(1, 4), memory=memory)
    with pytest.raises(ValueError, match="no dropout"):
        run(model, params, some_tokens(1, 1), cache=cache, deterministic=False, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match="leave positions out"):
        run(model, params, some_tokens(1, 1), cache=cache, positions=jnp.zeros((1, 1), jnp.int32))

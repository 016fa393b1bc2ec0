"""Is the network causal, are packed documents independent, does cached decoding equal the full pass?"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import BASE, VARIANTS, make, run, some_tokens

from stellarbyte_jax.model.cache import KVCache, pattern
from stellarbyte_jax.model.decoder import (
    ByteTransformer,
    forward_step,
    head_kernel,
    init_params,
    logical_axes,
    param_shapes,
)
from stellarbyte_jax.model.layers import param


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_feels_a_later_one(variant):
    model, params = make(variant)
    tokens = some_tokens(1, 12)

    def loss_at_six(table):
        return jnp.sum(jnp.square(run(model, {**params, "embed": {"embedding": table}}, tokens)[0, 6]))

    if model.config.tie_word_embeddings:
        with_other_end = tokens.at[0, 7:].set(some_tokens(5, seed=9))
        a, b = (run(model, params, t)[0, :7] for t in (tokens, with_other_end))
        np.testing.assert_array_equal(a, b)
        return
    only_late = np.setdiff1d(np.asarray(tokens[0, 7:]), np.asarray(tokens[0, :7]))
    slope = jax.grad(loss_at_six)(params["embed"]["embedding"])
    assert only_late.size and np.all(slope[only_late] == 0)
    assert np.any(slope[np.asarray(tokens[0, 6])] != 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_documents_alone(variant):
    model, params = make(variant)
    first, second = some_tokens(1, 7), some_tokens(1, 9, seed=3)
    row = jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1)
    ids = jnp.asarray([[1] * 7 + [2] * 9 + [0] * 2], jnp.int32)
    positions = jnp.asarray([[*range(7), *range(9), 0, 1]], jnp.int32)
    packed = run(model, params, row, positions=positions, segment_ids=ids)
    np.testing.assert_allclose(packed[:, :7], run(model, params, first), atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:16], run(model, params, second), atol=2e-5)
    other = row.at[0, 2].set((row[0, 2] + 1) % BASE.vocab_size)
    changed = run(model, params, other, positions=positions, segment_ids=ids)
    np.testing.assert_array_equal(changed[:, 7:16], packed[:, 7:16])
    assert np.any(np.asarray(changed[:, 2]) != np.asarray(packed[:, 2]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_full_pass(variant):
    """Ragged prompts, then single tokens, then a chunk of several, past the window's edge and round the ring."""
    model, params = make(variant)
    tokens = some_tokens(2, 20)
    full = run(model, params, tokens)
    cache = KVCache.create(model.config, 2, 24)
    prompt = jnp.asarray([6, 3], jnp.int32)
    logits, cache = run(model, params, tokens[:, :6], cache=cache, lengths=prompt)
    np.testing.assert_allclose(logits[0], full[0, :6], atol=2e-5)
    np.testing.assert_allclose(logits[1, :3], full[1, :3], atol=2e-5)
    step = jax.jit(lambda t, c: forward_step(model, params, t, c))
    for done in range(8):
        at = np.asarray([6, 3]) + done
        logits, cache = step(tokens[np.arange(2), at], cache)
        np.testing.assert_allclose(logits, full[np.arange(2), at], atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, [14, 11])
    chunk = jnp.stack([tokens[0, 14:20], tokens[1, 11:17]])
    logits, cache = run(model, params, chunk, cache=cache)
    np.testing.assert_allclose(logits[0], full[0, 14:20], atol=2e-5)
    np.testing.assert_allclose(logits[1], full[1, 11:17], atol=2e-5)


def test_no_two_tokens_of_a_call_are_written_to_one_slot():
    """More tokens than a ring has slots, ragged rows, sinks: only the newest, the sinks, and never padding."""
    config = make("windows, sinks, pruned weights, cap")[0].config
    cache = KVCache.create(config, 2, 30)
    positions = jnp.broadcast_to(jnp.arange(13, dtype=jnp.int32)[None], (2, 13))
    real = positions < jnp.asarray([[13], [7]])
    ring, full = cache.plan(positions, real)
    for row, length in enumerate((13, 7)):
        kept = [s for s in np.asarray(ring.slots_BT[row]) if s < 6]  # four of the window, two sinks
        assert len(set(kept)) == len(kept) == 6
        held = sorted(np.asarray(ring.positions_BS[row]).tolist())
        assert held == [0, 1, *range(length - 4, length)]
        assert np.asarray(full.slots_BT[row][:length]).tolist() == list(range(length))
        assert np.all(np.asarray(full.slots_BT[row][length:]) >= 30)


def test_scan_unroll_and_remat_change_nothing():
    tokens = some_tokens(2, 10)

    def loss_and_slope(**how):
        model, params = make("window", **how)
        return jax.value_and_grad(lambda p: jnp.mean(jnp.square(run(model, p, tokens))))(params)

    plain = loss_and_slope()
    for how in ({"scan_unroll": None}, {"scan_unroll": 2}, {"remat": "full"}, {"remat": "dots"}):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(loss_and_slope(**how)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_saves_memory():
    """The compiled gradient of a deep model keeps fewer bytes alive."""
    tokens = some_tokens(4, 64)

    def bytes_kept(remat):
        model, params = make("llama", remat=remat, num_hidden_layers=8)
        slope = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(run(model, p, tokens)))))
        return slope.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert bytes_kept("full") < 0.7 * bytes_kept("none")


def test_bfloat16_is_close_to_float32():
    tokens = some_tokens(2, 10)
    model, params = make("llama")
    exact = run(model, params, tokens)
    rounded = run(make("llama", compute_dtype="bfloat16")[0], params, tokens)
    assert rounded.dtype == jnp.float32
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 3e-2


def test_dropout_acts_everywhere_it_is_set_and_only_in_training():
    tokens = some_tokens(1, 10)
    for name in ("hidden_dropout", "residual_dropout", "attention_dropout"):
        model, params = make("llama", **{name: 0.5})
        plain = run(make("llama")[0], params, tokens)
        np.testing.assert_array_equal(run(model, params, tokens), plain)
        a, b = (run(model, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(k)}) for k in (1, 2))
        assert not np.allclose(a, plain) and not np.allclose(a, b)


def test_initial_weights():
    """Deviation 0.02; what writes into the residual stream is smaller by sqrt(2 layers)."""
    params = init_params(ByteTransformer(dataclasses.replace(BASE, hidden_size=128, head_dim=32)), jax.random.key(5))
    layer = params["layers"]["0"]
    assert np.std(layer["attn"]["q"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(layer["attn"]["o"]) == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert np.std(layer["mlp"]["down"]) == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert not np.allclose(layer["attn"]["q"][0], layer["attn"]["q"][1])
    assert np.all(params["final_norm"]["scale"] == 1)


def test_initialisation_does_not_grow_with_the_unrolled_depth():
    def program(**how):
        model = ByteTransformer(dataclasses.replace(BASE, **how))
        return str(jax.make_jaxpr(lambda key: init_params(model, key))(jax.random.key(0)))

    assert program(scan_unroll=None) == program(scan_unroll=1)


def test_the_tree_of_weights_and_its_axes():
    model, params = make("mixed windows, qk norm, bias")
    axes = logical_axes(model)
    assert axes["layers"]["1"]["attn"]["q"] == ("layers", "embed", "heads", "head_dim")
    assert axes["embed"]["embedding"] == ("vocab", "embed")
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == jax.tree.map(lambda s: s.shape, param_shapes(model))
    assert [kind.window for kind in pattern(model.config)] == [5, None]
    assert head_kernel(model.config, params) is params["lm_head"]["kernel"]
    same = jax.tree.map(lambda s, a: len(s) == len(a), shapes, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert all(jax.tree.leaves(same))


def test_the_pattern_is_the_shortest():
    mixed = ("sliding_attention", "sliding_attention", "full_attention")
    config = dataclasses.replace(BASE, num_hidden_layers=6, sliding_window=3, layer_types=mixed * 2)
    assert [kind.window for kind in pattern(config)] == [3, 3, None]
    assert len(pattern(dataclasses.replace(config, layer_types=("sliding_attention",) * 6))) == 1
    odd = (*mixed, "full_attention", "sliding_attention", "full_attention")
    assert len(pattern(dataclasses.replace(config, layer_types=odd))) == 6


def test_misuse_is_refused():
    model, params = make("llama")
    tokens = some_tokens(1, 6)
    cache = KVCache.create(model.config, 1, 4)
    with pytest.raises(ValueError, match="6 tokens do not fit into a cache of 4 slots"):
        run(model, params, tokens, cache=cache)
    with pytest.raises(ValueError, match="not both"):
        run(model, params, tokens, cache=cache, segment_ids=jnp.ones_like(tokens))
    with pytest.raises(ValueError, match="lengths belong to a cache"):
        run(model, params, tokens, lengths=jnp.asarray([3], jnp.int32))

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self):
            return param(self, "w", nn.initializers.zeros, embedd=3)

    with pytest.raises(ValueError, match="unknown axes"):
        Wrong().init(jax.random.key(0))

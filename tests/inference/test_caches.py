"""The caches of generation: of 8 bits, of bounded size, and with rows that come and go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_generation import PROMPTS, continue_to, make, some_rows

from stellarbyte_jax.config import CacheConfig
from stellarbyte_jax.inference import capacity, programs
from stellarbyte_jax.model.decoder import forward, forward_step, logits
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.state.cache import make_cache


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(model, params, tokens_BT, cache):
    """Logits of each token after a prompt of 8, one step at a time, and the cache."""

    def step(state, tokens_B):
        logits_BV, state = forward_step(model, params, tokens_B, state)
        return state, logits_BV

    state = forward(model, params, Inputs(tokens_BT[:, :8]), State(cache)).state
    state, logits_TBV = jax.lax.scan(step, state, tokens_BT[:, 8:].T)
    return jnp.swapaxes(logits_TBV, 0, 1), state.cache


def cache_error(dtype, **changes):
    """Root mean square error of logits by that of the logits, and the bytes of the cache by those of float32."""
    model, params = make(head_dim=16, **changes)
    tokens = some_rows(2, 40)
    exact, full = teacher_forced(model, params, tokens, make_cache(model.config, 2, 40))
    config = dataclasses.replace(model.config, cache=dataclasses.replace(model.config.cache, dtype=dtype))
    found, small = teacher_forced(model, params, tokens, make_cache(config, 2, 40))
    assert small.groups[0][0].storage.keys.dtype.itemsize == jnp.dtype(dtype).itemsize
    return float(jnp.sqrt(jnp.mean((found - exact) ** 2) / jnp.mean(exact**2))), small.nbytes / full.nbytes


RING = {"sliding_window": 9, "sink_tokens": 2}
PRUNED = {"cache": CacheConfig(heavy_hitters=30, recent=10)}


# What a head of 16 channels costs: 2 bytes each, or 1 each and 4 for their scale.
@pytest.mark.parametrize(
    ("changes", "dtype", "error", "share"),
    [
        (RING, "bfloat16", 0.01, 1 / 2),
        (RING, "int8", 0.025, 20 / 64),
        (RING, "float8_e4m3fn", 0.15, 20 / 64),
        (PRUNED, "int8", 0.025, 20 / 64),
    ],
)
def test_small_caches_are_nearly_as_good(changes, dtype, error, share):
    found, bytes_share = cache_error(dtype, **changes)
    assert error / 10 < found < error
    assert bytes_share == share


def test_prompts_in_parts_are_read_from_an_8_bit_cache_nearly_as_well():
    """At once a prompt sees itself exactly; in parts it sees what was stored."""
    model, params = make(sliding_window=9, cache=CacheConfig(dtype="int8"))
    result = continue_to(40, model, params, PROMPTS)
    in_parts = continue_to(40, model, params, PROMPTS, prefill_chunk=4)
    difference = np.abs(in_parts.log_probs[:, 0] - result.log_probs[:, 0])
    assert 0 < difference.max() < 0.05


def test_a_pruned_cache_never_grows():
    """Its keys are the newest and those with most attention, of whatever length the text is."""
    model, params = make(cache=CacheConfig(heavy_hitters=6, recent=4))
    assert capacity.limits_of(model.config).positions is None
    programs.prefill.clear_cache()
    programs.decode_block.clear_cache()
    for length in (40, 200):
        result = continue_to(length, model, params, PROMPTS)
        assert result.lengths.tolist() == [length - len(p) for p in PROMPTS]
    assert (programs.prefill._cache_size(), programs.decode_block._cache_size()) == (1, 1)
    sizes = []
    for T in (20, 120):
        found, cache = teacher_forced(model, params, some_rows(2, T), make_cache(model.config, 2, T))
        assert np.isfinite(found).all()
        sizes.append(cache.nbytes)
        for place in cache.groups[0]:
            kept = np.sort(np.asarray(place.positions_RBSK), axis=2)
            assert (np.diff(kept, axis=2) > 0).all() and (kept[:, :, :6] >= 0).all()
            assert (kept[:, :, 6:] == np.arange(T - 4, T)[None, None, :, None]).all()
    assert sizes == [2 * 2 * 2 * 10 * 2 * 4 * 4] * 2, "keys and values, layers, rows, slots, heads, channels, bytes"


CACHES = {
    "ring and full": {"sliding_window": 5, "sink_tokens": 2, "layer_types": ("sliding_attention", "full_attention")},
    "int8": {"cache": CacheConfig(dtype="int8")},
    "pruned": {"cache": CacheConfig(heavy_hitters=3, recent=6)},
}


@pytest.mark.parametrize("kind", CACHES)
def test_rows_come_and_go_without_touching_the_others(kind):
    model, params = make(**CACHES[kind])

    @jax.jit
    def apply(tokens, cache, lengths):
        out = forward(model, params, Inputs(tokens, lengths_B=lengths), State(cache))
        return logits(model, params, out.hidden_BTD), out.state.cache

    tokens = some_rows(3, 20)
    _, cache = teacher_forced(model, params, tokens, make_cache(model.config, 3, 32))
    goes_on = teacher_forced_on(model, params, cache)

    # Row 1 begins again with another text, while the others wait.
    emptied = cache.reset(jnp.asarray([False, True, False]))
    assert emptied.lengths_B.tolist() == [20, 0, 20]
    new = some_rows(3, 6, seed=5)
    answer, cache_after = apply(new, emptied, jnp.asarray([0, 6, 0]))
    fresh, fresh_cache = apply(new, make_cache(model.config, 3, 32), jnp.asarray([0, 6, 0]))
    np.testing.assert_allclose(answer[1], fresh[1], atol=0.05 if kind == "int8" else 5e-5)
    assert cache_after.lengths_B.tolist() == [20, 6, 20]
    found = teacher_forced_on(model, params, cache_after)
    for row in (0, 2):
        np.testing.assert_array_equal(found[row], goes_on[row])
    alone = teacher_forced_on(model, params, fresh_cache)
    np.testing.assert_allclose(found[1], alone[1], atol=0.05 if kind == "int8" else 5e-5)
    assert cache.reset().lengths_B.tolist() == [0, 0, 0]

    # Rows in another order, fewer and more often.
    chosen = cache.select([2, 0, 2, 1])
    found = teacher_forced_on(model, params, chosen.select([0, 1, 2]))
    np.testing.assert_allclose(found, goes_on[np.asarray([2, 0, 2])], atol=5e-5)
    np.testing.assert_array_equal(found[0], found[2])
    same = jax.tree.map(np.testing.assert_array_equal, chosen.select([1, 3, 0]), cache)
    assert jax.tree.structure(same) is not None

    # More rows, empty ones.
    grown = cache.grow(5)
    assert grown.lengths_B.tolist() == [20, 20, 20, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, grown.select([0, 1, 2]), cache)
    answer, grown = apply(new, grown.select([2, 4, 1]), jnp.asarray([0, 6, 0]))
    np.testing.assert_allclose(answer[1], fresh[1], atol=0.05 if kind == "int8" else 5e-5)
    found = teacher_forced_on(model, params, grown)
    np.testing.assert_allclose(found[np.asarray([0, 2])], goes_on[np.asarray([2, 1])], atol=5e-5)
    with pytest.raises(ValueError, match=r"the cache has 3 rows: name those of 2 to keep with select\(\)"):
        cache.grow(2)


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced_on(model, params, cache):
    """Logits of 6 more tokens, the same in every row."""

    def step(state, token):
        logits_BV, state = forward_step(model, params, jnp.full(cache.batch_size, token), state)
        return state, logits_BV

    tokens = jax.device_put(np.asarray([3, 1, 4, 1, 5, 9], np.int32))
    return jnp.swapaxes(jax.lax.scan(step, State(cache), tokens)[1], 0, 1)

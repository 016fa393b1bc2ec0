"""Is each setting the formula that it stands for, is the network causal, are packed documents independent?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_decoder import decoder
from helpers.variants import BASE, VARIANTS, call, make, mean_nll, run, run_on, some_tokens, step, weights_alone

from stellarbyte_jax.model.decoder import head_kernel
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.state.cache import make_cache


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_numpy(variant):
    model, params = make(variant)
    tokens = some_tokens(1, 11)
    logits = run(model, params, tokens)
    assert logits.shape == (1, 11, BASE.vocab_size)
    np.testing.assert_allclose(logits[0], decoder(model.config, params, tokens[0]), atol=3e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_finite_in_bfloat16_and_reach_every_weight(variant):
    model, params = make(variant, compute_dtype="bfloat16")
    tokens = some_tokens(2, 16)

    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes types in its backward pass
        found = jax.jit(jax.grad(mean_nll), static_argnums=1)(params, model, tokens)
    for path, slope in jax.tree_util.tree_leaves_with_path(weights_alone(model, found)):
        assert np.all(np.isfinite(slope)), path
        assert np.any(np.asarray(slope) != 0), path


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
    packed = run(model, params, row, positions_BT=positions, segment_ids_BT=ids)
    np.testing.assert_allclose(packed[:, :7], run(model, params, first), atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:16], run(model, params, second), atol=2e-5)
    other = row.at[0, 2].set((row[0, 2] + 1) % BASE.vocab_size)
    changed = run(model, params, other, positions_BT=positions, segment_ids_BT=ids)
    np.testing.assert_array_equal(changed[:, 7:16], packed[:, 7:16])
    assert np.any(np.asarray(changed[:, 2]) != np.asarray(packed[:, 2]))


@pytest.mark.parametrize("variant", ["llama", "tied"])
def test_bfloat16_is_close_to_float32(variant):
    tokens = some_tokens(2, 10)
    model, params = make(variant)
    exact = run(model, params, tokens)
    narrow = make(variant, compute_dtype="bfloat16")[0]
    rounded = run(narrow, params, tokens)
    assert rounded.dtype == jnp.float32 and np.any(rounded != rounded.astype(jnp.bfloat16).astype(jnp.float32))
    assert call(narrow, params, Inputs(tokens))[1].hidden_BTD.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 3e-2


def test_a_row_too_long_for_xpos_is_refused():
    model, params = make("xpos, geglu", xpos_scale_base=1.0, max_position_embeddings=200)
    with pytest.raises(ValueError, match=r"raise xpos_scale_base"):
        run(model, params, some_tokens(1, 140))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_full_pass(variant):
    """Ragged prompts, then single tokens, then a chunk of several, past the window's edge and round the ring."""
    model, params = make(variant)
    tokens = some_tokens(2, 20)
    full = run(model, params, tokens)
    prompt = jnp.asarray([6, 3], jnp.int32)
    found, state = run_on(model, params, tokens[:, :6], cache=make_cache(model.config, 2, 24), lengths_B=prompt)
    np.testing.assert_allclose(found[0], full[0, :6], atol=2e-5)
    np.testing.assert_allclose(found[1, :3], full[1, :3], atol=2e-5)
    for done in range(8):
        at = np.asarray([6, 3]) + done
        found, state = step(model, params, tokens[np.arange(2), at], state)
        np.testing.assert_allclose(found, full[np.arange(2), at], atol=2e-5)
    np.testing.assert_array_equal(state.cache.lengths_B, [14, 11])
    chunk = jnp.stack([tokens[0, 14:20], tokens[1, 11:17]])
    found, _ = run_on(model, params, chunk, cache=state.cache, router=state.router)
    np.testing.assert_allclose(found[0], full[0, 14:20], atol=2e-5)
    np.testing.assert_allclose(found[1], full[1, 11:17], atol=2e-5)


def test_the_head_is_a_weight_or_the_embedding():
    model, params = make("llama")
    np.testing.assert_array_equal(head_kernel(model, params), params["lm_head"]["kernel"])
    model, params = make("tied")
    np.testing.assert_array_equal(head_kernel(model, params), params["embed"]["embedding"].T)
    assert "lm_head" not in params


def test_arguments_that_exclude_each_other_are_refused():
    model, params = make("llama")
    tokens, one = some_tokens(1, 6), some_tokens(1, 1)
    cache = make_cache(model.config, 1, 4)
    with pytest.raises(ValueError, match="6 tokens do not fit into a cache of 4 slots"):
        run_on(model, params, tokens, cache=cache)
    with pytest.raises(ValueError, match="not both"):
        run_on(model, params, tokens, cache=cache, segment_ids_BT=jnp.ones_like(tokens))
    with pytest.raises(ValueError, match="lengths_B belongs to a cache"):
        run(model, params, tokens, lengths_B=jnp.asarray([3], jnp.int32))
    with pytest.raises(ValueError, match="no dropout"):
        call(model, params, Inputs(one), State(cache), jax.random.key(0))
    with pytest.raises(ValueError, match="leave positions_BT out"):
        run_on(model, params, one, cache=cache, positions_BT=jnp.zeros((1, 1), jnp.int32))

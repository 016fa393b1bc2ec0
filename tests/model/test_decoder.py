"""Is each setting the formula that it stands for, is the network causal, are packed documents independent?"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.numpy_decoder import decoder
from helpers.variants import BASE, VARIANTS, call, make, run, run_on, some_tokens, step, weights_alone

from stellarbyte_jax.model.decoder import head_kernel
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.state.cache import make_cache

# All tests of a variant call its programs with arrays of this shape, and compile each of them once.
TOKENS = np.asarray(some_tokens(2, 20))


# Each of the others has all of these, and more; of experts without twins another variant has some.
REPEATED = ("llama", "window", "experts")


@pytest.fixture(scope="module", params=mostly_slow(VARIANTS, *(name for name in VARIANTS if name not in REPEATED)))
def network(request):
    """The model and weights of a variant; tests of one follow each other."""
    return make(request.param)


def of_documents(model, params, rows, *lengths):
    """Logits of rows [2, 20] of documents of so many tokens, of one where nothing is said, and of padding."""
    ids, positions = np.zeros((2, 20), np.int32), np.zeros((2, 20), np.int32)
    for row, documents in enumerate(lengths or [(20,), (20,)]):
        ends = np.cumsum(documents)
        for number, (end, length) in enumerate(zip(ends, documents, strict=True), 1):
            ids[row, end - length : end], positions[row, end - length : end] = number, np.arange(length)
    packing = {"positions_BT": jax.device_put(positions), "segment_ids_BT": jax.device_put(ids)}
    return np.asarray(run(model, params, rows, **packing))


@partial(jax.jit, static_argnums=0)
def slopes(model, params, factors_BT):
    """Of the sum of losses of tokens, each times its factor."""

    def total(params):
        log_probs_BTV = jax.nn.log_softmax(call(model, params, Inputs(jax.device_put(TOKENS)))[0][:, :-1])
        return -jnp.sum(jnp.take_along_axis(log_probs_BTV, TOKENS[:, 1:, None], axis=-1)[..., 0] * factors_BT)

    return jax.grad(total)(params)


def test_logits_equal_numpy(network):
    """Of the first tokens of a row, whatever follows."""
    model, params = network
    logits = of_documents(model, params, TOKENS)
    assert logits.shape == (2, 20, BASE.vocab_size)
    np.testing.assert_allclose(logits[0, :11], decoder(model.config, params, TOKENS[0, :11]), atol=3e-5)
    if not model.config.moe.num_experts:  # rows of experts are added up in another order
        other_end = np.concatenate([TOKENS[:, :7], TOKENS[:, -2:6:-1], TOKENS[:, :1]], axis=1)
        np.testing.assert_array_equal(of_documents(model, params, other_end)[:, :7], logits[:, :7])


@pytest.mark.parametrize(
    "network",
    mostly_slow(
        VARIANTS,
        "mixed windows, qk norm, bias",
        "the original's own",
        "windows, sinks, pruned weights, cap",
        "experts of which some are twins",
        "a pool of experts, parallel, xpos",
    ),
    indirect=True,
)
def test_gradients_in_bfloat16_reach_every_weight_and_no_token_feels_a_later_one(network):
    model, params = network
    model = type(model)(dataclasses.replace(model.config, compute_dtype="bfloat16"))
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes types in its backward pass
        of_all = slopes(model, params, np.full((2, 19), 1 / 38, np.float32))
        of_one = slopes(model, params, np.float32(np.arange(38) == 6).reshape(2, 19))
    for path, slope in jax.tree_util.tree_leaves_with_path(weights_alone(model, of_all)):
        assert np.all(np.isfinite(slope)), path
        assert np.any(np.asarray(slope) != 0), path
    if not model.config.tie_word_embeddings:  # a tied table has a slope as the head
        only_late = np.setdiff1d(TOKENS, TOKENS[0, :7])
        slope = np.asarray(of_one["embed"]["embedding"])
        assert set(only_late) & set(TOKENS[0, 7:]) and np.all(slope[only_late] == 0)
        assert np.any(slope[TOKENS[0, 6]] != 0)


def test_packed_documents_equal_documents_alone(network):
    model, params = network
    alone = of_documents(model, params, TOKENS)
    first, second = TOKENS[0, :7], TOKENS[1, :9]
    padding = TOKENS[0, :4]
    rows = np.stack([np.concatenate(parts) for parts in ((first, second, padding), (second, first, padding))])
    packed = of_documents(model, params, rows, (7, 9), (9, 7))
    for found, document in ((packed[0, :7], 0), (packed[0, 7:16], 1), (packed[1, :9], 1), (packed[1, 9:16], 0)):
        np.testing.assert_allclose(found, alone[document, : len(found)], atol=2e-5)
    rows[0, 2] = (rows[0, 2] + 1) % BASE.vocab_size
    changed = of_documents(model, params, rows, (7, 9), (9, 7))
    np.testing.assert_array_equal(changed[0, 7:16], packed[0, 7:16])
    assert np.any(changed[0, 2] != packed[0, 2])


@pytest.mark.parametrize("variant", ["llama", "tied"])
def test_bfloat16_is_close_to_float32(variant):
    model, params = make(variant)
    exact = np.asarray(run(model, params, TOKENS))
    np.testing.assert_allclose(exact, of_documents(model, params, TOKENS), atol=2e-5)  # one document, without saying so
    rounded, out = call(make(variant, compute_dtype="bfloat16")[0], params, Inputs(jax.device_put(TOKENS)))
    assert rounded.dtype == jnp.float32 and np.any(rounded != rounded.astype(jnp.bfloat16).astype(jnp.float32))
    assert out.hidden_BTD.dtype == jnp.bfloat16
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2


def test_a_row_too_long_for_xpos_is_refused():
    model, params = make("xpos, geglu", xpos_scale_base=1.0, max_position_embeddings=200)
    with pytest.raises(ValueError, match=r"raise xpos_scale_base"):
        run(model, params, some_tokens(1, 140))


def test_cached_decoding_equals_the_full_pass(network):
    """Ragged prompts, then single tokens, then a chunk of several, past the window's edge and round the ring."""
    model, params = network
    full = of_documents(model, params, TOKENS)
    prompt = jax.device_put(np.asarray([6, 3], np.int32))
    found, state = run_on(model, params, TOKENS[:, :6], cache=make_cache(model.config, 2, 24), lengths_B=prompt)
    found = np.asarray(found)
    np.testing.assert_allclose(found[0], full[0, :6], atol=2e-5)
    np.testing.assert_allclose(found[1, :3], full[1, :3], atol=2e-5)
    for done in range(8):
        at = np.asarray([6, 3]) + done
        found, state = step(model, params, TOKENS[np.arange(2), at], state)
        np.testing.assert_allclose(found, full[np.arange(2), at], atol=2e-5)
    np.testing.assert_array_equal(state.cache.lengths_B, [14, 11])
    chunk = np.stack([TOKENS[0, 14:20], TOKENS[1, 11:17]])
    found = np.asarray(run_on(model, params, chunk, cache=state.cache, router=state.router)[0])
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
        run(model, params, tokens, lengths_B=jax.device_put(np.asarray([3], np.int32)))
    with pytest.raises(ValueError, match="no dropout"):
        call(model, params, Inputs(one), State(cache), jax.random.key(0))
    with pytest.raises(ValueError, match="leave positions_BT out"):
        run_on(model, params, one, cache=cache, positions_BT=jnp.zeros((1, 1), jnp.int32))

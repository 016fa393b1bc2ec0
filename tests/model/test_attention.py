"""One attention for whole rows, prefill and cached decoding: each of them gets the kernel that is chosen."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE, init, make, make_model, some_tokens

from stellarbyte_jax.config import CacheConfig, LayerSpec
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.decoder import ByteTransformer, forward
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.memory import LayerMemory
from stellarbyte_jax.ops import dispatch
from stellarbyte_jax.ops.attention import api
from stellarbyte_jax.ops.attention.reference import reference_attention
from stellarbyte_jax.ops.rotary import Frequencies

MIXED = {"sliding_window": 5, "layer_types": ("sliding_attention", "full_attention") * 2}


@pytest.fixture
def kernel_calls(monkeypatch):
    """Another kernel, which comes first and leaves its name in a program: the masks of its calls."""
    calls = []

    def marked(q_BTNH, k_BSKH, v_BSKH, mask, options):
        calls.append(mask)
        with jax.named_scope("marked_kernel"):
            return reference_attention(q_BTNH, k_BSKH, v_BSKH, mask, options)

    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"marked": marked, **api.IMPLEMENTATIONS})
    return calls


def test_a_new_kernel_is_used_by_whole_rows_prefill_and_cached_decoding(kernel_calls):
    model, params = make_model(dataclasses.replace(BASE, **MIXED))
    state = State(make_cache(model.config, 1, 16))

    def masks_of(T, state):
        kernel_calls.clear()
        out = jax.eval_shape(lambda p, t, s: forward(model, p, Inputs(t), s), params, some_tokens(1, T), state)
        return [(mask.window, mask.aligned, mask.k_positions_BSK.shape[1]) for mask in kernel_calls], out.state

    assert masks_of(9, None)[0] == [(5, True, 9), (None, True, 9)]
    prefill, state = masks_of(9, state)
    assert prefill == [(5, True, 9), (None, True, 9)]
    assert masks_of(1, state)[0] == [(5, False, 5), (None, False, 16)]
    assert masks_of(3, state)[0] == [(5, False, 8), (None, False, 16)]


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_chosen_kernel_runs_in_the_compiled_gradient(remat, kernel_calls):
    """Forward, and with remat once more in the backward pass."""
    model = ByteTransformer(dataclasses.replace(BASE, remat=remat))
    params, tokens = init(model), some_tokens(1, 8)

    def loss(params):
        return jnp.sum(jnp.square(forward(model, params, Inputs(tokens)).hidden_BTD))

    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    lines = [line for line in text.splitlines() if "marked_kernel" in line and "exponential" in line]
    assert any("rematted" not in line for line in lines)
    assert any("rematted" in line for line in lines) == (remat != "none")


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_fused_kernel_runs_in_the_compiled_gradient(remat):
    config = dataclasses.replace(BASE, remat=remat, compute_dtype="bfloat16", attention_implementation="cudnn")
    model = ByteTransformer(config)
    params, tokens = init(model), some_tokens(1, 64)

    def loss(params):
        return jnp.sum(jnp.square(forward(model, params, Inputs(tokens)).hidden_BTD.astype(jnp.float32)))

    with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes types in its backward pass
        text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    assert "cudnn" in text and "Backward" in text


def test_over_a_cache_a_named_kernel_may_step_aside_and_that_is_logged_once(monkeypatch, caplog):
    """In a whole row it may not."""
    monkeypatch.setattr(dispatch, "_logged", set())
    caplog.set_level(logging.INFO)
    more = {"attention_implementation": "xla", "cache": CacheConfig(heavy_hitters=2, recent=3)}
    model, params = make("llama", **more)
    state = State(make_cache(model.config, 1, 16))
    for _ in range(2):
        jax.eval_shape(lambda p, t, s: forward(model, p, Inputs(t), s), params, some_tokens(1, 4), state)
    (message,) = caplog.messages
    assert message.startswith("attention over a cache: using reference (xla refused: attention weights as a result;")
    capped = ByteTransformer(dataclasses.replace(model.config, attention_logit_softcap=3.0))
    with pytest.raises(NotImplementedError, match="attention: xla refused: a logit soft cap"):
        jax.eval_shape(lambda p, t: forward(capped, p, Inputs(t)), params, some_tokens(1, 4))


def context(positions, segments=None, max_segments=None):
    T = positions.shape[1]
    rows = jnp.arange(T, dtype=jnp.int32)[None]
    return LayerContext(positions, rows, segments, Frequencies(jnp.ones(4)), max_segments)


def test_the_mask_of_a_row_counts_places_and_shows_the_first_tokens_of_each_document():
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2]], jnp.int32)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2]], jnp.int32)
    mask = context(positions, ids, 3).mask(LayerSpec(2), None, sink_tokens=1)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    np.testing.assert_array_equal(mask.allowed()[0, 0], np.asarray(expected, bool))
    assert (mask.max_segments, mask.aligned, mask.window) == (3, True, 2)
    assert context(positions, ids).mask(LayerSpec(None), None, sink_tokens=1).always_visible_BSK is None


def test_the_mask_behind_a_memory_shows_valid_slots_to_the_first_document_alone():
    """Two compressed slots, which every token sees, and two recent ones within the window; one of each is empty."""
    memory = LayerMemory(jnp.zeros((1, 4, 32)), jnp.asarray([[False, True, False, True]]))
    positions = jnp.asarray([[7, 8, 9, 0]], jnp.int32)
    ids = jnp.asarray([[1, 1, 1, 2]], jnp.int32)
    mask = context(positions, ids, 2).mask(LayerSpec(3, 2, 2), memory, sink_tokens=0)
    expected = [[0, 1, 0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask.allowed()[0, 0], np.asarray(expected, bool))
    assert mask.max_segments == 2
    alone = context(positions).mask(LayerSpec(3, 2, 2), memory, sink_tokens=0)
    np.testing.assert_array_equal(alone.allowed()[0, 0, :3], np.asarray(expected, bool)[:3])
    assert alone.max_segments is None and alone.k_segments_BS is None

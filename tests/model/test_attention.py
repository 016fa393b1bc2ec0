"""Attention is that of transformers; whole rows, prefill and cached decoding all get the kernel that is chosen."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import pytest
from helpers.peers import compare, context, make_peer, their_arguments
from helpers.variants import BASE, init, make, make_model, some_tokens

from stellarbyte_jax.config import CacheConfig, LayerSpec
from stellarbyte_jax.model.attention import Attention
from stellarbyte_jax.model.decoder import ByteTransformer, forward
from stellarbyte_jax.model.io import Inputs, LayerState, State
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.ops import dispatch
from stellarbyte_jax.ops.attention import api
from stellarbyte_jax.ops.attention.reference import reference_attention

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


@pytest.mark.parametrize("name", ["llama, one head each, wide", "llama, biases, geglu", "qwen3"])
def test_attention(name):
    """Of the others as parts of their blocks, see test_block.py."""
    layer, rotary, config = make_peer(name)
    given, ctx, module = their_arguments(rotary), context(config), Attention(config, LayerSpec(None))
    compare(
        layer,
        config,
        lambda tree: tree["attn"],
        lambda x: layer.self_attn(hidden_states=x, **given)[0],
        lambda p, x: module.apply({"params": p}, x, ctx, LayerState())[0],
    )

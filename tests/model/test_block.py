"""A block is a decoder layer of transformers; what its branches pass through is set in the config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peers import PEERS, compare, context, make_peer, their_arguments
from helpers.variants import BASE

from stellarbyte_jax.config import LayerSpec
from stellarbyte_jax.model.block import Block
from stellarbyte_jax.model.io import LayerState
from stellarbyte_jax.model.state.cache import make_cache


@pytest.mark.parametrize("name", PEERS)
def test_block(name):
    layer, rotary, config = make_peer(name)
    given, ctx, module = their_arguments(rotary), context(config), Block(config, LayerSpec(None))
    depth = jnp.zeros((), jnp.int32)
    compare(
        layer,
        config,
        lambda tree: tree,
        lambda x: layer(x, **given),
        lambda p, x: module.apply({"params": p}, x, ctx, LayerState(), depth)[0],
    )


def block_of_biases(depth=0, **settings):
    """What a block adds to a stream of ones, when attention gives 1 and the feed-forward layer 10 everywhere."""
    config = dataclasses.replace(BASE, mlp_bias=True, attention_output_bias=True, **settings)
    module = Block(config, LayerSpec(None))
    given = np.ones((2, 9, 32), np.float32), context(config), LayerState(), np.int32(depth)
    shapes = jax.eval_shape(lambda *given: module.init(jax.random.key(0), *given)["params"], *given)
    params = jax.tree.map(lambda x: np.zeros(x.value.shape, x.value.dtype), shapes, is_leaf=boxed)
    params["attn"]["o_bias"] += 1
    params["mlp"]["down_bias"] += 10
    for name in ("attn_scale", "mlp_scale"):
        if name in params:
            params[name] += {"attn_scale": 3.0, "mlp_scale": 0.5}[name]
    return np.asarray(jax.jit(lambda params, *given: module.apply({"params": params}, *given)[0])(params, *given)) - 1


def boxed(x):
    return hasattr(x, "use")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 11),
        ({"layer_scale_init": 0.1}, 3 * 1 + 0.5 * 10),
        ({"residual_scaling": "branch"}, 11 / np.sqrt(8)),
        ({"residual_scaling": "branch", "layer_scale_init": 0.1}, 8 / np.sqrt(8)),
        ({"drop_path": 0.5}, 11),  # off outside of training
    ],
    ids=str,
)
def test_branches_are_scaled_as_the_config_says(settings, expected):
    np.testing.assert_allclose(block_of_biases(depth=3, **settings), expected, rtol=1e-6)


def test_a_block_returns_its_cache_and_leaves_the_state_without_one_alone():
    config = dataclasses.replace(BASE, num_hidden_layers=1)
    module, ctx, depth = Block(config, LayerSpec(None)), context(config), jnp.zeros((), jnp.int32)
    x = np.random.default_rng(1).standard_normal((2, 9, 32)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x, ctx, LayerState(), depth)
    apply = jax.jit(module.apply)
    plain, state, _ = apply(params, x, ctx, LayerState(), depth)
    assert state == LayerState()
    begun, _ = make_cache(config, 2, 9).begin(jnp.ones((2, 9), bool), None)
    cached, state, _ = apply(params, x, ctx, LayerState(begun.groups[0][0]), depth)
    np.testing.assert_allclose(cached, plain, atol=1e-6)
    assert np.abs(np.asarray(state.cache.storage.keys)).min(axis=(0, 3, 4)).all()

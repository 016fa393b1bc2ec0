"""Is each layer the published one? Against transformers' own modules, forward and gradients of inputs and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peers import PEERS, as_ours, make_peer

from stellarbyte_jax.config import LayerSpec
from stellarbyte_jax.model.attention import Attention
from stellarbyte_jax.model.block import Block
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.io import LayerState
from stellarbyte_jax.model.mlp import MLP
from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.model.positions import position_scheme

T = 9


def compare(layer, config, part, theirs, ours):
    """Results, and the gradients of their product with some cotangent; ``part`` is ours of the layer's weights."""
    import torch

    random = np.random.default_rng(0)
    x, g = (random.normal(size=(2, T, config.hidden_size)).astype(np.float32) for _ in range(2))
    their_x = torch.from_numpy(x).requires_grad_()
    expected = theirs(their_x)
    expected.backward(torch.from_numpy(g))
    params = jax.tree.map(jnp.asarray, part(as_ours(layer, config)))
    found, pull = jax.vjp(jax.jit(ours), params, jnp.asarray(x))
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    slopes, x_slope = pull(jnp.asarray(g))
    np.testing.assert_allclose(x_slope, their_x.grad.numpy(), atol=1e-5)
    their_slopes = part(as_ours(layer, config, gradients=True))
    assert jax.tree.structure(slopes) == jax.tree.structure(their_slopes)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(their_slopes), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


def context(config):
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    rope = position_scheme(config).frequencies(positions, None, positions >= 0, cached=False)
    return LayerContext(jnp.repeat(positions, 2, axis=0), positions, None, rope)


def their_arguments(rotary):
    import torch

    positions = torch.arange(T)[None]
    mask = torch.full((T, T), -1e30).triu(1)[None, None]
    return {"position_embeddings": rotary(torch.zeros(1), positions), "attention_mask": mask}


@pytest.mark.parametrize("name", PEERS)
def test_attention(name):
    layer, rotary, config = make_peer(name)
    given, ctx, module = their_arguments(rotary), context(config), Attention(config, LayerSpec(None))
    compare(
        layer,
        config,
        lambda tree: tree["attn"],
        lambda x: layer.self_attn(hidden_states=x, **given)[0],
        lambda p, x: module.apply({"params": p}, x, ctx, LayerState())[0],
    )


@pytest.mark.parametrize("name", ["llama, grouped", "llama, biases, geglu", "llama, tanh"])
def test_mlp(name):
    layer, _, config = make_peer(name)
    ours = lambda p, x: MLP(config).apply({"params": p}, x, False)  # noqa: E731
    compare(layer, config, lambda tree: tree["mlp"], layer.mlp, ours)


def test_rms_norm():
    layer, _, config = make_peer("llama, tanh")  # a large eps
    ours = lambda p, x: RMSNorm(config).apply({"params": p}, x)  # noqa: E731
    compare(layer, config, lambda tree: tree["attn_norm"], layer.input_layernorm, ours)


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

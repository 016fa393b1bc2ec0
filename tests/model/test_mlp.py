"""The feed-forward layer is that of transformers, or the original's formula; dropout comes last."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.peers import compare, make_peer
from helpers.variants import BASE

from stellarbyte_jax.model.mlp import MLP


@pytest.mark.parametrize("name", ["llama, grouped", "llama, biases, geglu", "llama, tanh"])
def test_mlp(name):
    layer, _, config = make_peer(name)
    ours = lambda p, x: MLP(config).apply({"params": p}, x, False)  # noqa: E731
    compare(layer, config, lambda tree: tree["mlp"], layer.mlp, ours)


def test_the_originals_style_is_its_formula():
    """A norm with an eps of its own, the activation on the other half, and the input added once more."""
    config = dataclasses.replace(BASE, mlp_style="stellarbyte", rms_norm_eps=0.3)
    random = np.random.default_rng(0)
    x, both, down, scale = (random.normal(size=shape) for shape in ((2, 3, 32), (32, 2, 48), (48, 32), (32,)))
    n = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
    gate, up = n @ both[:, 0], n @ both[:, 1]
    expected = (up / (1 + np.exp(-up)) / (1 + np.exp(-gate))) @ down + x
    params = {"gate_up": both, "down": down, "norm": {"scale": scale}}
    params = jax.tree.map(lambda a: jax.device_put(np.asarray(a, np.float32)), params)
    found = MLP(config).apply({"params": params}, jax.device_put(np.asarray(x, np.float32)), False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_dropout_leaves_out_results_in_training_alone():
    config = dataclasses.replace(BASE, hidden_dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (4, 8, 32))
    params = MLP(config).init(jax.random.key(0), x, False)
    plain = MLP(config).apply(params, x, False)
    dropped = MLP(config).apply(params, x, True, rngs={"dropout": jax.random.key(2)})
    left = dropped != 0
    assert 0.4 < np.mean(left) < 0.6 and np.all(plain != 0)
    np.testing.assert_allclose(dropped[left], 2 * plain[left], rtol=1e-6)

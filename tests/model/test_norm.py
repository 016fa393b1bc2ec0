"""The norm is that of transformers, forward and backward; its axis, its eps and its eps rule are its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peers import compare, make_peer
from helpers.variants import BASE

from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.model.params import weight_uses


def test_rms_norm():
    layer, _, config = make_peer("llama, tanh")  # a large eps
    ours = lambda p, x: RMSNorm(config).apply({"params": p}, x)  # noqa: E731
    compare(layer, config, lambda tree: tree["attn_norm"], layer.input_layernorm, ours)


def test_the_axis_names_the_weight():
    boxed = RMSNorm(BASE, axis="head_dim").init(jax.random.key(0), jnp.ones((2, 3, 4, 8)))["params"]
    use = weight_uses(boxed)["scale"]
    assert (use.axes, use.float32, use.is_matrix) == (("head_dim",), True, False)
    np.testing.assert_array_equal(boxed["scale"].value, np.ones(8))


@pytest.mark.parametrize(
    ("settings", "eps", "expected"),
    [
        ({}, None, 3 / np.sqrt(9 + 0.5)),
        ({}, 7.0, 3 / np.sqrt(9 + 7)),
        ({"rms_norm_eps_rule": "clamp"}, None, 1.0),
        ({"rms_norm_eps_rule": "clamp"}, 16.0, 3 / np.sqrt(16)),
    ],
)
def test_the_eps_is_the_models_unless_another_is_given(settings, eps, expected):
    config = dataclasses.replace(BASE, rms_norm_eps=0.5, **settings)
    found = RMSNorm(config, eps=eps).apply({"params": {"scale": jnp.full(4, 2.0)}}, jnp.full((1, 4), 3.0))
    np.testing.assert_allclose(found, np.full((1, 4), 2 * expected), rtol=1e-6)

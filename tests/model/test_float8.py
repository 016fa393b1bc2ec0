"""Training with products of 8 bits: where they are, how far gradients are apart, and that nothing else changes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import compiled_step, first_state, packed_batch, settings
from helpers.variants import make, some_tokens, weights_alone

from stellarbyte_jax.model.decoder import forward
from stellarbyte_jax.model.io import Inputs, State

VARIANTS = ("llama", "the original's own", "a dense layer, experts by sigmoid in groups, one shared, windows")


def slopes(variant, dtype):
    model, weights = make(variant, matmul_dtype=dtype)
    return weights_alone(model, jax.jit(jax.grad(lambda p: loss(model, p)))(weights))


def loss(model, params, train=True):
    tokens = some_tokens(2, 16)
    config = dataclasses.replace(model.config, residual_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0)
    out = forward(type(model)(config), params, Inputs(tokens), State(), train=train)
    return jnp.mean(jnp.square(out.hidden_BTD.astype(jnp.float32) - 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_8_bits(variant):
    plain, narrow = slopes(variant, "compute"), slopes(variant, "float8")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(narrow), strict=True):
        if np.linalg.norm(a):
            apart = np.linalg.norm(a - b) / np.linalg.norm(a)
            assert apart < 0.3, (jax.tree_util.keystr(path), apart)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (plain, narrow))
    assert 1e-3 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.15


@pytest.mark.parametrize("variant", VARIANTS)
def test_they_are_in_training_alone(variant):
    (model, weights), (narrow, _) = make(variant), make(variant, matmul_dtype="float8")
    assert float(loss(model, weights, train=False)) == float(loss(narrow, weights, train=False))
    assert float(loss(model, weights)) != float(loss(narrow, weights))


def products(variant):
    """Of each product of 8 bits in a training step's forward pass, how many there are."""
    model, weights = make(variant, matmul_dtype="float8")
    text = jax.jit(lambda p: loss(model, p)).lower(weights).as_text()
    return len(re.findall(r"dot_general.*f8E4M3FN.*f8E4M3FN", text))


def test_attention_and_mlp_have_them_and_experts_have_not():
    one = products("llama")
    assert one and one % 6 == 0  # q, k, v, o, gate and up, down, of each layer that the program holds
    of_experts = products("experts")
    assert of_experts and of_experts % 4 == 0 and of_experts * 6 == one * 4


def test_a_run_learns_as_with_the_compute_dtype():
    batch = {name: jnp.asarray(x) for name, x in packed_batch().items()}

    def losses(dtype):
        base = settings()
        config = dataclasses.replace(base, model=dataclasses.replace(base.model, matmul_dtype=dtype))
        state, step, found = first_state(config), compiled_step(config), []
        for _ in range(40):
            state, metrics = step(state, batch)
            found.append(float(metrics["cross_entropy"]))
        return found

    plain, narrow = losses("compute"), losses("float8")
    assert plain[-1] < 0.6 * plain[0]
    np.testing.assert_allclose(narrow, plain, rtol=0.05)
    assert narrow != plain

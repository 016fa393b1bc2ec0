"""What is random in a layer with experts: its first weights, dropout, and experts that are drawn."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense_experts
from helpers.variants import BASE

from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.io import LayerState
from stellarbyte_jax.model.moe import MoE

D, T = 6, 60
POSITIONS = jnp.arange(T, dtype=jnp.int32)[None]
CONTEXT = LayerContext(POSITIONS, POSITIONS, None, None, None, True, jnp.ones((1, T), bool))


def config_of(**more):
    moe = {"num_experts": 5, "intermediate_size": 20, **more.pop("moe")}
    return dataclasses.replace(BASE, hidden_size=D, num_attention_heads=1, num_key_value_heads=1, moe=moe, **more)


@partial(jax.jit, static_argnums=0)
def first_weights(config):
    ctx = CONTEXT.replace(train=False)
    made = MoE(config).init(jax.random.key(0), jnp.zeros((1, T, D)), ctx, LayerState())["params"]
    return jax.tree.map(lambda box: box.value, made, is_leaf=lambda x: hasattr(x, "use"))


@partial(jax.jit, static_argnums=0)
def output(config, weights, x, key):
    return MoE(config).apply({"params": weights}, x, CONTEXT, LayerState(), rngs={"dropout": key})[0]


X = jax.random.normal(jax.random.key(1), (1, T, D))


def test_deviations_are_those_of_an_mlp_and_dropout_is_of_the_sum_of_all_experts():
    """What writes into the residual stream begins smaller by sqrt(2 layers)."""
    config = config_of(moe={"n_shared_experts": 1}, hidden_dropout=0.5, num_hidden_layers=8)
    weights = first_weights(config)
    for part in ("experts", "shared"):
        for name, deviation in (("gate_up", 0.02), ("down", 0.02 / 4)):
            assert np.std(weights[part][name]) == pytest.approx(deviation, rel=0.2), (part, name)
    weights = jax.tree.map(lambda x: 20 * x, weights)
    noisy = np.asarray(output(config, weights, X, jax.random.key(3)))[0]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        quiet = np.asarray(dense_experts.moe(config, weights, X[0], jnp.ones(T, bool))[0])
    kept = noisy != 0
    assert 0.42 < kept.mean() < 0.58 and np.all(quiet != 0)
    np.testing.assert_allclose(noisy[kept], 2 * quiet[kept], rtol=1e-4, atol=1e-6)


def test_random_experts_are_other_ones_in_each_step():
    full = {"dispatch": "capacity", "min_capacity": 1, "capacity_factor": 1.0, "overflow": ("random",)}
    config = config_of(moe={"num_experts_per_tok": 1, **full})
    weights = first_weights(config)
    one, again, other = (np.asarray(output(config, weights, X, jax.random.key(number))) for number in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)

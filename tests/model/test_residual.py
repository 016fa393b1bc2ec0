"""Residual styles: each is its formula, and keeps its scale through depth."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import REPEATS
from helpers.variants import BASE, call, init, slopes_of_nll, some_tokens

from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import Aux, Inputs, LayerState, Mean
from stellarbyte_jax.model.residual import Branches, deepnorm, parallel, residual_style, sequential
from stellarbyte_jax.model.state.memory import LayerMemory


def branches(config, seen):
    """Pieces that can be told apart: norms add 1 and 2, attention gives 10 x, the feed-forward layer 100 x."""

    def attend(n, state):
        seen.append(state.memory.states)
        return 10 * n, LayerState(cache="attended"), Aux.of({"x": jnp.asarray(1.0)})

    def mlp(n, state):
        return 100 * n, state._replace(memory=f"after {state.cache}"), Aux.of({"x": jnp.asarray(2.0)})

    return Branches(
        config=config,
        attn_norm=lambda x: x + 1,
        mlp_norm=lambda x: x + 2,
        attend=attend,
        mlp=mlp,
        scale_attn=lambda h: 3 * h,
        scale_mlp=lambda h: 5 * h,
        drop=lambda h: 7 * h,
    )


@pytest.mark.parametrize(
    ("style", "expected", "memory"),
    [
        (sequential, lambda x, a: (y := x + 7 * 3 * 10 * (x + 1)) + 7 * 5 * 100 * (y + 2), 5.0),
        (parallel, lambda x, a: x + 7 * (3 * 10 * (x + 1) + 5 * 100 * (x + 1)), 5.0),
        (deepnorm, lambda x, a: (y := a * x + 7 * 3 * 10 * x + 1, a * y + 7 * 5 * 100 * y + 2)[1], 4.0),
    ],
)
def test_each_style_is_its_formula(style, expected, memory):
    """Memory passes the first norm where the stream does."""
    seen = []
    memory_of_layer = LayerMemory(jnp.full((1, 4, 3), 4.0), jnp.ones((1, 4), bool))
    given = LayerState(memory=memory_of_layer)
    found, state, aux = style(branches(BASE, seen), jnp.full((1, 2, 3), 2.0), given)
    np.testing.assert_allclose(found, expected(2.0, (2 * BASE.num_hidden_layers) ** 0.25), rtol=1e-6)
    np.testing.assert_array_equal(seen[0], memory)
    assert state == LayerState("attended", "after attended")
    assert aux == Aux({"x": Mean(3.0, 2.0)})


def test_a_config_chooses_its_style():
    assert residual_style(BASE) is residual_style(dataclasses.replace(BASE, residual_scaling="branch")) is sequential
    assert residual_style(dataclasses.replace(BASE, parallel_residual=True)) is parallel
    assert residual_style(dataclasses.replace(BASE, residual_scaling="deepnorm")) is deepnorm


def spread_through_depth(layers=100, **settings):
    """Standard deviation of the stream after each layer, and of the loss's slope with respect to each layer's o."""
    config = dataclasses.replace(BASE, num_hidden_layers=layers, hidden_size=64, head_dim=16, **settings)
    model = ByteTransformer(config)
    params = init(model)
    tokens = some_tokens(2, 16)

    slope = np.asarray(slopes_of_nll(params, model, tokens)["layers"]["0"]["attn"]["o"])
    norms = np.sqrt(np.sum(np.square(slope), axis=(1, 2, 3)))
    hidden = call(model, params, Inputs(tokens))[1].hidden_BTD
    return float(jnp.std(hidden)), norms


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"residual_scaling": "branch", "initialization": "normal"}, marks=REPEATS),
        {"residual_scaling": "deepnorm"},
        pytest.param({"layer_scale_init": 0.1}, marks=REPEATS),
        pytest.param({"parallel_residual": True}, marks=REPEATS),
    ],
    ids=["depth", "branch", "deepnorm", "layer scale", "parallel"],
)
def test_scales_stay_through_a_hundred_layers(settings):
    spread, norms = spread_through_depth(**settings)
    assert 0.5 < spread < 2
    assert np.all(norms > 0) and norms.max() / norms.min() < 10

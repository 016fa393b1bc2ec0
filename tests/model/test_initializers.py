"""Initial weights by their role."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from helpers.variants import BASE

from stellarbyte_jax.model.decoder import ByteTransformer, init_params


def drawn(config, seed):
    return jax.tree.map(np.asarray, jax.jit(partial(init_params, ByteTransformer(config)))(jax.random.key(seed)))


def test_initial_weights():
    """Deviation 0.02; what writes into the residual stream is smaller by sqrt(2 layers)."""
    params = drawn(dataclasses.replace(BASE, hidden_size=128, head_dim=32), 5)
    layer = params["layers"]["0"]
    assert np.std(layer["attn"]["q"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(layer["attn"]["o"]) == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert np.std(layer["mlp"]["down"]) == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert not np.allclose(layer["attn"]["q"][0], layer["attn"]["q"][1])
    assert np.all(params["final_norm"]["scale"] == 1)


@pytest.mark.parametrize("scheme", ["normal", "depth", "stellarbyte", "deepnorm"])
def test_deviations_of_each_scheme(scheme):
    L, D, F = 8, 128, 512
    config = dataclasses.replace(BASE, num_hidden_layers=L, hidden_size=D, head_dim=32, intermediate_size=F)
    config = dataclasses.replace(config, num_key_value_heads=4, initialization=scheme)
    params = drawn(config, 4)
    layer, small = params["layers"]["0"], 0.02 / (2 * L) ** 0.5
    beta = (8 * L) ** -0.25
    square, wide = (2 / (D + D)) ** 0.5, (2 / (D + F)) ** 0.5
    expected = {
        "normal": (0.02, 0.02, 0.02, 0.02, 0.02, 0.02),
        "depth": (0.02, 0.02, small, 0.02, small, 0.02),
        "stellarbyte": (small,) * 6,
        "deepnorm": (square, beta * square, beta * square, beta * wide, beta * wide, 0.02),
    }[scheme]
    weights = (
        layer["attn"]["k"],
        layer["attn"]["v"],
        layer["attn"]["o"],
        layer["mlp"]["gate_up"],
        layer["mlp"]["down"],
        params["lm_head"]["kernel"],
    )
    np.testing.assert_allclose([np.std(w) for w in weights], expected, rtol=0.04)


def test_initialisation_does_not_grow_with_the_unrolled_depth():
    def program(**how):
        model = ByteTransformer(dataclasses.replace(BASE, **how))
        return str(jax.make_jaxpr(lambda key: init_params(model, key))(jax.random.key(0)))

    assert program(scan_unroll=None) == program(scan_unroll=1)

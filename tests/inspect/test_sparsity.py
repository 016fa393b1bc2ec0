"""Statistics of weights, against numpy over whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import make

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.inspect import sparsity
from stellarbyte_jax.inspect.sparsity import WeightStatistics, weight_statistics


def by_path(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def of_layer(params, layer, *names):
    found = [x[layer] for path, x in by_path(params).items() if path.removeprefix("layers/0/") in names]
    assert len(found) == len(names)
    return np.concatenate([x.ravel() for x in found]).astype(np.float64)


def check(found, expected, thresholds):
    assert found.count == expected.size
    np.testing.assert_allclose([found.mean, found.std], [expected.mean(), expected.std()], rtol=1e-9, atol=1e-12)
    assert found.largest == np.abs(expected).max()
    assert found.share(0) == (expected == 0).mean()
    for threshold in thresholds:
        assert found.share(threshold) == (np.abs(expected) < threshold).mean()


@pytest.mark.parametrize("at_once", [1000, 1 << 22])
def test_layers_and_parts(at_once, monkeypatch):
    monkeypatch.setattr(sparsity, "_AT_ONCE", at_once)
    thresholds = (0.01, 0.05)
    model, params = make("mixed windows, qk norm, bias")
    params["layers"]["0"]["mlp"]["down"] = params["layers"]["0"]["mlp"]["down"].at[2, :5].set(0)
    found = weight_statistics(model.config, params, thresholds)
    attention = ("attn/q", "attn/k", "attn/v", "attn/o", "attn/q_bias", "attn/k_bias", "attn/v_bias")
    norms = ("attn_norm/scale", "mlp_norm/scale", "attn/q_norm/scale", "attn/k_norm/scale")
    for layer, parts in enumerate(found.layers):
        check(parts["attention"], of_layer(params, layer, *attention), thresholds)
        check(parts["mlp"], of_layer(params, layer, "mlp/gate_up", "mlp/down"), thresholds)
        check(parts["norms"], of_layer(params, layer, *norms), thresholds)
    assert found.layers[2]["mlp"].zeros == 5 * 32 and found.layers[1]["mlp"].zeros == 0
    check(found.outside["head"], np.float64(params["lm_head"]["kernel"]), thresholds)
    whole = np.concatenate([x.ravel() for x in by_path(params).values()]).astype(np.float64)
    check(found.whole, whole, thresholds)
    mlp = np.concatenate([of_layer(params, layer, "mlp/gate_up", "mlp/down") for layer in range(4)])
    check(found.parts["mlp"], mlp, thresholds)


def test_experts_and_routers():
    """Of the layers that have them, whose stack they share with no dense one; what routers keep is left out."""
    model, params = make("a dense layer, experts by sigmoid in groups, one shared, windows")
    params["layers"]["1"]["moe"]["router"]["tracked"]["bias"] += 100.0
    found = weight_statistics(model.config, params)
    assert set(found.layers[0]) == {"attention", "mlp", "norms"} and found.whole.largest < 10
    stack = params["layers"]["1"]["moe"]
    for row, layer in enumerate(found.layers[1:]):
        for part, name in (("experts", "experts"), ("shared_experts", "shared")):
            expected = np.concatenate([np.ravel(stack[name][leaf][row]) for leaf in ("down", "gate_up")])
            check(layer[part], np.float64(expected), (1e-3,))
        check(layer["router"], np.float64(stack["router"]["kernel"][row]).ravel(), (1e-3,))


def test_rows_that_pad_the_vocabulary_are_left_out():
    model, params = make("deepnorm, learned xpos, padded vocabulary")
    params["embed"]["embedding"] = params["embed"]["embedding"].at[61:].set(100.0)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, 61:].set(100.0)
    found = weight_statistics(model.config, params)
    assert found.whole.largest < 10
    assert (found.outside["embedding"].count, found.outside["head"].count) == (61 * 32, 61 * 32)


def test_any_dtype_and_numbers_that_are_none():
    model, params = make("tied")
    half = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
    expected = np.concatenate([x.ravel() for x in by_path(half).values()]).astype(np.float64)
    check(weight_statistics(model.config, half).whole, expected, sparsity.THRESHOLDS)
    params["layers"]["0"]["mlp"]["down"] = params["layers"]["0"]["mlp"]["down"].at[1, 0, 0].set(jnp.nan)
    found = weight_statistics(model.config, params)
    assert np.isnan(found.layers[1]["mlp"].std) and np.isnan(found.layers[1]["mlp"].largest)
    assert np.isnan(found.whole.largest) and np.isfinite(found.layers[0]["mlp"].std)


def test_thresholds_are_magnitudes():
    model, params = make("tied")
    with pytest.raises(ConfigError, match="thresholds are magnitudes and must be positive"):
        weight_statistics(model.config, params, (0.0,))


def test_a_weight_at_a_threshold_is_not_below_it():
    found = WeightStatistics()
    found.add(np.array([0.5, -0.5, 0.25, 0.0], np.float32), (0.5,))
    assert (found.below, found.zeros) == ({0.5: 2}, 1)

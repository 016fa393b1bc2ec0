"""Is each setting of the decoder the formula that it stands for, alone and with the others?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import decoder
from variants import BASE, VARIANTS, make, mean_nll, run, some_tokens

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.model.decoder import ByteTransformer, init_params


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_numpy(variant):
    model, params = make(variant)
    tokens = some_tokens(1, 11)
    logits = run(model, params, tokens)
    assert logits.shape == (1, 11, BASE.vocab_size)
    np.testing.assert_allclose(logits[0], decoder(model.config, params, tokens[0]), atol=3e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_finite_in_bfloat16_and_reach_every_weight(variant):
    model, params = make(variant, compute_dtype="bfloat16")
    tokens = some_tokens(2, 16)

    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes types in its backward pass
        found = jax.jit(jax.grad(mean_nll), static_argnums=1)(params, model, tokens)
    for path, slope in jax.tree_util.tree_leaves_with_path(found):
        assert np.all(np.isfinite(slope)), path
        assert np.any(np.asarray(slope) != 0), path


def test_padding_of_the_vocabulary_changes_nothing():
    plain, params = make("llama", vocab_size=61)
    padded, _ = make("llama", vocab_size_multiple=32)
    assert padded.config.padded_vocab_size == 64
    more = {
        **params,
        "embed": {"embedding": jnp.pad(params["embed"]["embedding"], ((0, 3), (0, 0)), constant_values=9.0)},
        "lm_head": {"kernel": jnp.pad(params["lm_head"]["kernel"], ((0, 0), (0, 3)), constant_values=9.0)},
    }
    tokens = some_tokens(2, 7)
    np.testing.assert_allclose(run(padded, more, tokens), run(plain, params, tokens), atol=1e-6)


def test_drop_path_leaves_out_whole_rows_more_often_in_deep_layers():
    """One layer's branches at a time: the share of rows without a branch is rate * i / (L - 1), the rest is scaled."""
    L, rate, rows = 3, 0.6, 400
    config = dataclasses.replace(BASE, num_hidden_layers=L, drop_path=rate, parallel_residual=True)
    model, plain = ByteTransformer(config), ByteTransformer(dataclasses.replace(config, drop_path=0.0))
    params = init_params(model, jax.random.key(0))
    tokens = jnp.broadcast_to(some_tokens(1, 4), (rows, 4))
    for layer in range(L):
        # Branches of the other layers write nothing.
        only = jax.tree.map(lambda x: x, params)
        for path in (("attn", "o"), ("mlp", "down")):
            weight = only["layers"]["0"][path[0]][path[1]]
            only["layers"]["0"][path[0]][path[1]] = jnp.zeros_like(weight).at[layer].set(50 * weight[layer])
        hidden = run(model, only, tokens, head=False)
        noisy = run(model, only, tokens, head=False, deterministic=False, rngs={"dropout": jax.random.key(layer)})
        nothing = jax.tree.map(lambda x: x, only)
        for path in (("attn", "o"), ("mlp", "down")):
            nothing["layers"]["0"][path[0]][path[1]] = 0 * only["layers"]["0"][path[0]][path[1]]
        without = run(model, nothing, tokens[:1], head=False)
        dropped = np.all(np.abs(noisy - without) < 1e-5, axis=(1, 2))
        assert dropped.mean() == pytest.approx(rate * layer / (L - 1), abs=0.08)
        np.testing.assert_array_equal(hidden, run(plain, only, tokens, head=False))  # off in evaluation
        if layer == 0:
            np.testing.assert_array_equal(noisy, hidden)
        kept = np.asarray(noisy)[~dropped]
        assert np.abs(kept - kept[0]).max() < 1e-5  # all rows are alike, so all kept ones are
        larger = jax.tree.map(lambda x: x, only)
        for path in (("attn", "o"), ("mlp", "down")):
            larger["layers"]["0"][path[0]][path[1]] = only["layers"]["0"][path[0]][path[1]] / (
                1 - rate * layer / (L - 1)
            )
        np.testing.assert_allclose(kept[0], run(plain, larger, tokens[:1], head=False)[0], atol=1e-4)


def spread_through_depth(layers=100, **settings):
    """Standard deviation of the stream after each layer, and of the loss's slope with respect to each layer's o."""
    config = dataclasses.replace(BASE, num_hidden_layers=layers, hidden_size=64, head_dim=16, **settings)
    model = ByteTransformer(config)
    params = init_params(model, jax.random.key(3))
    tokens = some_tokens(2, 16)

    slope = jax.jit(jax.grad(mean_nll), static_argnums=1)(params, model, tokens)["layers"]["0"]["attn"]["o"]
    norms = np.sqrt(np.sum(np.square(slope), axis=(1, 2, 3)))
    hidden = run(model, params, tokens, head=False)
    return float(jnp.std(hidden)), norms


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"residual_scaling": "branch", "initialization": "normal"},
        {"residual_scaling": "deepnorm"},
        {"layer_scale_init": 0.1},
        {"parallel_residual": True},
    ],
    ids=["depth", "branch", "deepnorm", "layer scale", "parallel"],
)
def test_scales_stay_through_a_hundred_layers(settings):
    spread, norms = spread_through_depth(**settings)
    assert 0.5 < spread < 2
    assert np.all(norms > 0) and norms.max() / norms.min() < 10


@pytest.mark.parametrize("scheme", ["normal", "depth", "stellarbyte", "deepnorm"])
def test_deviations_of_each_scheme(scheme):
    L, D, F = 8, 128, 512
    config = dataclasses.replace(BASE, num_hidden_layers=L, hidden_size=D, head_dim=32, intermediate_size=F)
    config = dataclasses.replace(config, num_key_value_heads=4, initialization=scheme)
    params = init_params(ByteTransformer(config), jax.random.key(4))
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel_residual": True, "residual_scaling": "deepnorm"}, "one branch after the other"),
        ({"residual_scaling": "deepnorm", "initialization": "depth"}, "its own initialisation"),
        ({"xpos_learnable": True}, "no rates to learn"),
        ({"position_embedding": "stellarbyte", "rope_pairing": "interleaved"}, "a pairing of its own"),
        ({"mlp_style": "stellarbyte", "hidden_act": "gelu"}, "a gate of its own"),
        ({"sink_tokens": 4}, "give sliding_window"),
        ({"rope_scaling": {"factor": 2.0}}, "name one of linear"),
        ({"rope_scaling": {"name": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"name": "linear", "original_max_position_embeddings": 9}}, "belongs to yarn and llama3"),
        ({"rope_scaling": {"name": "linear", "factor": 2.0, "beta_fast": 8.0}}, "beta_fast belongs to yarn, "),
        ({"rope_scaling": {"name": "yarn", "factor": 2.0, "low_freq_factor": 2.0}}, "belongs to llama3, "),
        ({"rope_scaling": {"name": "yarn", "factor": 2.0, "beta_fast": 1.0}}, "must be above beta_slow"),
        ({"xpos_scale_base": 64.0}, "plain RoPE does not decay"),
        ({"memory": {"length": 8, "fusion_weight": 0.5}}, "sliding_share below 1"),
        ({"memory": {"length": 8}, "sliding_window": 4}, "leave out sliding_window"),
        ({"memory": {"length": (8, 8)}}, "num_hidden_layers is 4"),
        ({"memory": {"length": 8}, "rope_scaling": {"name": "dynamic", "factor": 2.0}}, "distances alone"),
        ({"memory": {"length": 8}, "cache": {"heavy_hitters": 1, "recent": 1}}, "cannot be used with memory"),
        ({"memory": {"length": 8, "sliding_share": 0.0}}, "no slot for the newest"),
        ({"memory": {"fusion_weight": 0.5}}, "memory.length is 0"),
        ({"cache": {"recent": 8}}, "belong together"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **settings)


def test_a_row_too_long_for_xpos_is_refused():
    model, params = make("xpos, geglu", xpos_scale_base=1.0, max_position_embeddings=200)
    with pytest.raises(ValueError, match=r"raise xpos_scale_base"):
        run(model, params, some_tokens(1, 140))

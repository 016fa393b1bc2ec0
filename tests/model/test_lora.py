"""Are adapters of each weight what their formula says, and do they change nothing else?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import DENSE, EXPERTS, TIED, adapted, merged_by_hand
from helpers.training import flat
from helpers.variants import call, make_model, run, run_on, some_tokens, step

from stellarbyte_jax.inference.programs import cast_for_inference
from stellarbyte_jax.lora import as_base, mean_square_change, merge_adapters, shares, split, with_adapters
from stellarbyte_jax.model.decoder import (
    ByteTransformer,
    head_factors,
    head_kernel,
    logits,
    param_shapes,
    param_uses,
    trained,
)
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.lora import is_learnt
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.trees import merge, partition, paths

TOKENS = some_tokens(2, 12)
ATTENTION_AND_MLP = ("q", "k", "v", "o", "gate_up", "down")
EVERYTHING = (*ATTENTION_AND_MLP, "experts", "shared", "router", "embed", "head")
SETTINGS = {
    "rslora, some layers": (DENSE, {"rslora": True, "lora_alpha": 5.0, "layers": (0, 2)}),
    "dora, some layers": (DENSE, {"dora": True, "target_modules": (*ATTENTION_AND_MLP, "head"), "layers": (0, 2)}),
    "experts": (EXPERTS, {"target_modules": EVERYTHING}),
    "dora of experts": (EXPERTS, {"dora": True, "target_modules": ("experts", "shared", "router")}),
    "a tied table": (TIED, {"target_modules": ("embed", "q")}),
    "a pool": (
        dataclasses.replace(EXPERTS, moe={**EXPERTS.moe.to_dict(), "shared_pool": True}),
        {"target_modules": ("experts", "router")},
    ),
}


SLOW = ("a pool", "dora of experts")


@pytest.mark.parametrize(
    "kind", [kind if kind not in SLOW else pytest.param(kind, marks=pytest.mark.slow) for kind in SETTINGS]
)
def test_adapters_are_their_formula(kind):
    """Logits are those of the weights with the adapters in them, by hand and by the product."""
    config, lora = SETTINGS[kind]
    model, params = adapted(config, **lora)
    found = run(model, params, TOKENS)
    base, by_hand = ByteTransformer(config), merged_by_hand(params)
    expected = run(base, by_hand, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - run(base, split(params)[1], TOKENS)).max() > 0.1
    merged_model, merged = merge_adapters(model, params)
    assert merged_model == base and paths(merged) == paths(by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5), merged, by_hand)


@pytest.mark.parametrize("target", EVERYTHING)
def test_each_target_is_its_weight_alone(target):
    """Adapters lie beside the weights that are named, everywhere these are, and nowhere else."""
    model = ByteTransformer(dataclasses.replace(EXPERTS, lora={"r": 2, "target_modules": (target,)}))
    params = param_shapes(model)
    found = {path.removesuffix("_lora_a") for path in paths(params) if path.endswith("_lora_a")}
    of_layers = {
        **{name: {f"layers/{n}/attn/{name}" for n in (0, 1)} for name in ("q", "k", "v", "o")},
        **{name: {f"layers/0/mlp/{name}"} for name in ("gate_up", "down")},
        **{name: {f"layers/1/moe/{name}/{w}" for w in ("gate_up", "down")} for name in ("experts", "shared")},
        "router": {"layers/1/moe/router/kernel"},
        "embed": {"embed/embedding"},
        "head": {"lm_head/kernel"},
    }
    assert found == of_layers[target]
    learnt = {path for path in paths(partition(params, trained(model))[0])}
    assert learnt == {f"{path}_lora_{part}" for path in found for part in "ab"}


def test_a_bias_that_chooses_experts_is_not_among_those_that_are_trained_whole():
    lora = {"r": 2, "target_modules": ("q",), "modules_to_save": ("biases",)}
    model = ByteTransformer(dataclasses.replace(EXPERTS, attention_bias=True, lora=lora))
    learnt = {path for path in paths(param_shapes(model)) if is_learnt(model.config.lora, tuple(path.split("/")))}
    whole = {path.rpartition("/")[2] for path in learnt if "_lora_" not in path}
    assert whole == {"q_bias", "k_bias", "v_bias"} and any(
        path.endswith("/bias") for path in paths(param_shapes(model))
    )


@pytest.mark.parametrize("kind", ["experts", "dora, some layers"])
def test_fresh_adapters_change_nothing(kind):
    config, lora = SETTINGS[kind]
    model = ByteTransformer(dataclasses.replace(config, lora={"r": 3, **lora}))
    base, params = make_model(config)
    fresh = with_adapters(model, params, jax.random.key(0))
    again = with_adapters(model, params, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, fresh, again)
    found, expected = run(model, fresh, TOKENS), run(base, params, TOKENS)
    if lora.get("dora"):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", (3 * 32) ** -0.5), ("gaussian", 1 / 64)])
def test_the_first_numbers(init, deviation):
    """A of uniform numbers below 1 / sqrt(inputs), or normal ones; B zero; the factor alpha / r."""
    config = dataclasses.replace(DENSE, lora={"r": 64, "init": init, "target_modules": ("q", "embed")})
    fresh = with_adapters(ByteTransformer(config), make_model(DENSE)[1], jax.random.key(1))
    attn, embed = fresh["layers"]["0"]["attn"], fresh["embed"]
    assert attn["q_lora_a"].shape == (3, 32, 64)
    np.testing.assert_allclose(np.std(attn["q_lora_a"]), deviation, rtol=0.05)
    assert not np.any(attn["q_lora_b"]) and not np.any(embed["embedding_lora_a"])
    assert 0.9 < np.std(embed["embedding_lora_b"]) < 1.1
    np.testing.assert_array_equal(attn["q_lora_scale"], np.full(3, 16 / 64, np.float32))


@functools.cache
def slopes(**changes):
    """Of a loss with respect to all that adapters of everything learn."""
    model, params = adapted(EXPERTS, target_modules=EVERYTHING)
    model = ByteTransformer(dataclasses.replace(model.config, **changes))
    trainable, frozen = partition(params, trained(model))

    def loss(trainable):
        found = call(model, merge(trainable, frozen), Inputs(TOKENS))[0]
        return jnp.mean(jax.nn.logsumexp(found, axis=-1) - found[..., 0])

    return jax.jit(jax.grad(loss))(trainable)


def test_gradients_reach_all_that_is_trained():
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes()):
        assert np.all(np.isfinite(slope)) and np.any(np.asarray(slope) != 0), path


@pytest.mark.parametrize(
    "changes", [pytest.param({"remat": "dots"}, marks=pytest.mark.slow), {"remat": "full", "scan_unroll": None}]
)
def test_remat_and_unrolled_layers_give_the_same_gradients(changes):
    def close(found, expected):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    jax.tree.map(close, slopes(**changes), slopes())


def test_a_layer_without_adapters_has_no_gradient():
    model, params = adapted(DENSE, target_modules=("q", "down"), layers=(0, 2))
    trainable, frozen = partition(params, trained(model))
    found = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(call(model, merge(x, frozen), Inputs(TOKENS))[0]))))(trainable)
    for slope in jax.tree.leaves(found):
        assert np.any(slope[0]) and not np.any(slope[1]) and np.any(slope[2])


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_an_activation_of_the_inner_channels(activation):
    """By hand, of the head, whose logits are a product of the last hidden states."""
    model, params = adapted(DENSE, target_modules=("head",), activation=activation)
    hidden = jax.device_put(np.asarray(np.random.default_rng(0).standard_normal((5, 32)), np.float32))
    head = params["lm_head"]
    act = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}[activation]
    added = act(hidden @ head["kernel_lora_a"]) @ head["kernel_lora_b"] * (16 / 3)
    np.testing.assert_allclose(logits(model, params, hidden), hidden @ head["kernel"] + added, atol=2e-5)
    with pytest.raises(ValueError, match=rf"lora.activation={activation} .* cannot be merged"):
        merge_adapters(model, params)


def test_weights_of_length_0_stay_so_with_dora():
    """A padded vocabulary has such columns, which have no direction to divide by."""
    config = dataclasses.replace(DENSE, lora={"r": 3, "dora": True, "target_modules": ("head",)})
    model, base = ByteTransformer(config), make_model(DENSE)[1]
    padded = {**base, "lm_head": {"kernel": base["lm_head"]["kernel"].at[:, 5:].set(0)}}
    params = with_adapters(model, padded, jax.random.key(0))
    hidden = jax.device_put(np.asarray(np.random.default_rng(0).standard_normal((4, 32)), np.float32))

    def loss(head):
        found = logits(model, {**params, "lm_head": head}, hidden)
        return jnp.mean(jax.nn.logsumexp(found, axis=-1) - found[..., 0])

    slopes = jax.grad(loss)(params["lm_head"])
    for part in ("kernel_lora_b", "kernel_lora_m"):
        assert np.all(np.isfinite(slopes[part])) and np.all(slopes[part][..., :5]) and not np.any(slopes[part][..., 5:])
    for made in (merge_adapters(model, params)[1]["lm_head"], {"kernel": head_kernel(model, params)}):
        np.testing.assert_allclose(made["kernel"], padded["lm_head"]["kernel"], atol=1e-6)
    uses = param_uses(model)["lm_head"]
    adapters, weights = split(params["lm_head"])
    share = shares(weights, adapters, uses)["kernel_lora_share"]
    np.testing.assert_allclose(share, np.arange(len(share)) < 5, atol=1e-6)


@pytest.mark.parametrize(("config", "lora"), [(DENSE, {}), (DENSE, {"dora": True}), (TIED, {})])
def test_the_head_of_a_loss_is_that_of_the_logits(config, lora):
    target = "embed" if config is TIED else "head"
    model, params = adapted(config, target_modules=(target,), **lora)
    hidden = jax.device_put(np.asarray(np.random.default_rng(0).standard_normal((2, 5, 32)), np.float32))
    expected = logits(model, params, hidden)
    kernel_DV, low = head_factors(model, params, hidden)
    assert (low is None) == bool(lora)
    found = hidden @ kernel_DV + (0 if low is None else low.h @ low.b)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(hidden @ head_kernel(model, params), expected, atol=2e-5)


def test_dropout_is_of_what_adapters_read_in_training_alone():
    model, params = adapted(DENSE, dropout=0.5)
    plain = run(adapted(DENSE)[0], params, TOKENS)
    np.testing.assert_array_equal(run(model, params, TOKENS), plain)
    draws = [run(model, params, TOKENS, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - plain).max() > 0.01 and np.abs(draws[0] - draws[2]).max() > 0.01
    fresh = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key.endswith("_b") else x, params)
    base = split(params)[1]
    np.testing.assert_array_equal(
        run(model, fresh, TOKENS, dropout_key=jax.random.key(0)), run(ByteTransformer(DENSE), base, TOKENS)
    )


def test_dropout_of_adapters_keeps_the_mean():
    """Over many draws, of the head, which is linear in what its adapter reads."""
    model, params = adapted(DENSE, target_modules=("head",), dropout=0.5)
    hidden = jax.device_put(np.asarray(np.random.default_rng(0).standard_normal((1, 32)), np.float32))
    keys = jax.random.split(jax.random.key(0), 2000)
    inner = jax.jit(jax.vmap(lambda key: head_factors(model, params, hidden, dropout_key=key)[1].h))(keys)
    expected = head_factors(model, params, hidden)[1].h
    np.testing.assert_allclose(np.mean(inner, axis=0), expected, atol=0.25)
    assert np.std(inner, axis=0).min() > 0.5


def test_cached_decoding_is_the_full_pass():
    config, lora = SETTINGS["rslora, some layers"]
    model, params = adapted(config, **lora)
    full = run(model, params, TOKENS)
    _, state = run_on(model, params, TOKENS[:, :6], cache=make_cache(model.config, 2, 12))
    for at in range(6, 9):
        found, state = step(model, params, TOKENS[:, at], state)
        np.testing.assert_allclose(found, full[:, at], atol=1e-4)


def test_a_bfloat16_base_gives_what_bfloat16_products_give():
    """Matrices and tables are rounded once instead of in each product."""
    config = dataclasses.replace(DENSE, num_hidden_layers=1, compute_dtype="bfloat16")
    model, params = adapted(config, base_dtype="bfloat16", target_modules=("q", "down"))
    plain = adapted(config, target_modules=("q", "down"))[1]
    expected = run(model, plain, TOKENS)
    np.testing.assert_array_equal(run(model, params, TOKENS), expected)
    np.testing.assert_array_equal(run(model, cast_for_inference(model, params), TOKENS), expected)


def test_what_is_used_in_float32_stays_so_in_a_bfloat16_base():
    model = ByteTransformer(dataclasses.replace(EXPERTS, lora={"r": 2, "base_dtype": "bfloat16"}))
    base = make_model(EXPERTS)[1]
    rounded = jax.eval_shape(lambda: as_base(model, base))
    kinds = {name: x.dtype for name, x in flat(rounded).items() if "tracked" not in name}
    float32 = {name for name, dtype in kinds.items() if dtype == jnp.float32}
    norms = {f"layers/{n}/{part}_norm/scale" for n in (0, 1) for part in ("attn", "mlp")}
    assert float32 == norms | {"final_norm/scale", "layers/1/moe/router/kernel"}
    assert {kinds[name] for name in kinds.keys() - float32} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", ["rslora, some layers", "a tied table"])
def test_the_mean_square_of_what_adapters_add(kind):
    config, lora = SETTINGS[kind]
    model, params = adapted(config, **lora)
    base = split(params)[1]
    by_hand = merged_by_hand(params)
    targets = {path.removesuffix("_lora_a") for path in paths(params) if path.endswith("_lora_a")}
    changes = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (np.sum((a - b) ** 2), a.size) if _name(path) in targets else (0.0, 0), by_hand, base
    )
    found = jax.tree.leaves(changes, is_leaf=lambda x: isinstance(x, tuple))
    expected = sum(total for total, _ in found) / sum(size for _, size in found)
    np.testing.assert_allclose(mean_square_change(model, params), expected, rtol=1e-4)


def _name(path):
    return "/".join(key.key for key in path)

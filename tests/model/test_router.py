"""Routers: what is drawn in training, what is not drawn elsewhere, and what is computed in float32."""

import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numpy_decoder
from helpers.grids import mostly_slow
from helpers.training import RECORDER, packed_batch, settings
from helpers.variants import BASE, make, some_tokens

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model import router as router_module
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.router import Router
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.training.state import create_state
from stellarbyte_jax.training.step import make_train_step

E, D, MANY = 4, 6, 20000


def config_of(**moe):
    moe = {"num_experts": E, "num_experts_per_tok": 1, **moe}
    return dataclasses.replace(BASE, hidden_size=D, num_attention_heads=1, num_key_value_heads=1, moe=moe)


def weights_of(config, **values):
    """Weights of a router, of which these are given."""
    made = jax.tree.map(lambda x: x, initial(config))
    for name, value in values.items():
        at, leaf = (made["tracked"], name) if name in made["tracked"] else (made, name)
        assert at[leaf].shape == np.shape(value)
        at[leaf] = jax.device_put(np.asarray(value, np.float32))
    return made


@functools.cache
def initial(config):
    x = jnp.zeros((1, 1, D))
    made = jax.jit(lambda x: Router(config).init(jax.random.key(0), x, context(x, False), None)["params"])
    return nn.meta.unbox(made(x))


def context(x, train):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    return LayerContext(positions, positions[:1], None, None, None, train)


@partial(jax.jit, static_argnums=(0, 3))
def decide(config, weights, x, train=False, key=0):
    """The decision, without its number of rows."""
    rngs = {"dropout": jax.random.key(key)} if train else None
    found = Router(config).apply({"params": weights}, x, context(x, train), None, rngs=rngs)
    return found._replace(routed=found.routed._replace(rows=None))


def same(x, tokens=MANY):
    """So many tokens that are all alike."""
    return jnp.broadcast_to(jax.device_put(np.asarray(x, np.float32))[None, None], (1, tokens, D))


def shares(found):
    return np.bincount(np.asarray(found.choices.experts_NK)[:, 0], minlength=E) / found.choices.experts_NK.shape[0]


X = np.random.default_rng(0).standard_normal(D)
KERNEL = np.random.default_rng(1).standard_normal((D, E)) / 3
NOISES = {"noisy_topk": {"noise": "noisy_topk"}, "gumbel": {"noise": "gumbel"}, "warm-up": {"router_warmup_steps": 9}}


@pytest.mark.parametrize("noise", NOISES)
def test_scores_are_noisy_in_training_alone(noise):
    plain, noisy = config_of(num_experts_per_tok=2), config_of(num_experts_per_tok=2, **NOISES[noise])
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    weights = weights_of(noisy, kernel=KERNEL)
    expected = decide(plain, weights_of(plain, kernel=KERNEL), x)
    found = decide(noisy, weights, x)
    jax.tree.map(np.testing.assert_array_equal, found.choices, expected.choices)
    np.testing.assert_array_equal(found.routed.scores_NE, expected.routed.scores_NE)
    drawn = [decide(noisy, weights, x, True, key).routed.scores_NE for key in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.all(np.any(np.asarray(drawn[0]) != drawn[2], axis=1)), "every token has noise of its own"
    assert np.all(np.any(np.asarray(drawn[0]) != expected.routed.scores_NE, axis=1))
    logits = decide(noisy, weights, x, True).routed.logits_NE
    np.testing.assert_allclose(logits, np.reshape(x, (-1, D)) @ np.float32(KERNEL), atol=1e-5)  # log(Z)^2 is of these


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_gumbel_noise_draws_experts_by_their_scores(scale, temperature):
    """The largest of logits with Gumbel noise of a size is drawn from the softmax of logits by that size."""
    config = config_of(noise="gumbel", noise_scale=scale, temperature=temperature)
    found = decide(config, weights_of(config, kernel=KERNEL), same(X), True)
    logits = X @ KERNEL / temperature / scale
    np.testing.assert_allclose(shares(found), np.exp(logits) / np.exp(logits).sum(), atol=0.02)


def test_noisy_topk_has_normal_noise_of_a_learned_size():
    config = config_of(noise="noisy_topk", noise_scale=0.5, scoring_func="sigmoid")
    sizes = np.random.default_rng(2).standard_normal((D, E))
    found = decide(config, weights_of(config, kernel=KERNEL, noise=sizes), same(X), True)
    scores = np.float64(found.routed.scores_NE)
    drawn = (np.log(scores / (1 - scores)) - X @ KERNEL) / (0.5 * np.log1p(np.exp(X @ sizes)))
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(drawn.std(0), 1, atol=0.03)
    np.testing.assert_allclose((drawn**4).mean(0), 3, atol=0.3)  # that of a normal distribution
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(E), atol=0.03)
    np.testing.assert_allclose(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1], 0, atol=0.03)


def test_the_size_of_noise_is_learned():
    config = config_of(noise="noisy_topk", num_experts_per_tok=2, norm_topk_prob=False)
    weights, x = weights_of(config, kernel=KERNEL), jax.random.normal(jax.random.key(1), (2, 5, D))
    slope = jax.grad(lambda w: jnp.sum(decide(config, w, x, True).choices.weights_NK ** 2))(weights)
    assert np.all(np.any(np.asarray(slope["noise"]) != 0, axis=0))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_fewer_and_fewer_tokens_go_to_random_experts_in_the_first_steps(scoring):
    """All tokens want expert 2; a random one is that in one case of four."""
    config = config_of(router_warmup_steps=8, scoring_func=scoring)
    for steps, lost in ((0, 1.0), (2, 0.75), (6, 0.25), (8, 0.0), (20, 0.0)):
        weights = weights_of(config, kernel=np.outer(X, [0, 0, 9, 0]) / (X @ X), steps=steps)
        found = shares(decide(config, weights, same(X), True))
        np.testing.assert_allclose(found, lost / E + (1 - lost) * np.eye(E)[2], atol=0.015)
        assert lost > 0 or found[2] == 1


def test_noise_and_warm_up_draw_different_numbers():
    both = config_of(noise="gumbel", router_warmup_steps=8, scoring_func="sigmoid")
    noise = config_of(noise="gumbel", scoring_func="sigmoid")
    x, weights = same(X, 200), weights_of(both, kernel=KERNEL, steps=4.0)
    found, alone = (np.asarray(decide(c, weights, x, True).routed.scores_NE) for c in (both, noise))
    equal = np.all(found == alone, axis=1)
    assert 0.3 < equal.mean() < 0.7


@pytest.mark.parametrize("load", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, 0, 0, 0]])
@pytest.mark.parametrize("learned", [-1.5, 0.8, 0.01])
def test_a_learned_temperature_rises_with_uneven_loads(load, learned):
    config = config_of(adaptive_temperature=True, temperature=0.7)
    assert float(weights_of(config)["temperature"]) == pytest.approx(0.7)
    weights = weights_of(config, kernel=KERNEL, temperature=learned, load=load)
    expected = max(abs(learned) * (1 + np.std(load) / 0.25), 0.3)
    for train in (False, True):
        found = decide(config, weights, same(X, 3), train)
        assert float(found.temperature) == pytest.approx(expected, rel=1e-4)
        logits = X @ KERNEL / expected
        np.testing.assert_allclose(found.routed.scores_NE[0], np.exp(logits) / np.exp(logits).sum(), atol=1e-6)
    slope = jax.grad(lambda w: jnp.max(decide(config, w, same(X, 1), True).routed.scores_NE))(weights)
    assert (float(slope["temperature"]) != 0) == (expected > 0.3)


def test_scores_in_training_are_those_of_the_formula():
    """Priorities, coldness, temperature and bias: the same as in inference, and none has a slope."""
    config = config_of(
        num_experts_per_tok=2, expert_priority=True, cooling_steps=5, adaptive_temperature=True, scoring_func="sigmoid"
    )
    kept = {"priority": [0.5, 1.5, 1, 0.2], "coldness": [0, 0.5, 1, 0], "load": [0.4, 0.3, 0.2, 0.1]}
    kept["utilization"] = [0.9, 0.7, 0.6, 0.8]
    bias = np.float64([0.0, -0.5, 0.0, 0.9])
    weights = weights_of(config, kernel=KERNEL, bias=bias, **kept)
    x = np.random.default_rng(3).standard_normal((2, 5, D))
    found = decide(config, weights, jax.device_put(np.asarray(x, np.float32)), True)
    wide = jax.tree.map(np.float64, weights)
    for n, token in enumerate(x.reshape(-1, D)):
        expected = numpy_decoder.scores(config, wide, token @ KERNEL)
        np.testing.assert_allclose(found.routed.scores_NE[n], expected, atol=1e-5)
        np.testing.assert_allclose(found.routed.logits_NE[n], token @ KERNEL, atol=1e-5)  # as the gate gives them
        order = np.argsort(-(expected + bias))[:2]
        assert found.choices.experts_NK[n].tolist() == order.tolist()
        np.testing.assert_allclose(found.choices.weights_NK[n], expected[order] / expected[order].sum(), atol=1e-5)
    np.testing.assert_array_equal(found.utilization_E, np.float32(kept["utilization"]))
    slopes = jax.grad(lambda w: jnp.sum(decide(config, w, same(X, 3), True).choices.weights_NK ** 2))(weights)
    assert not any(np.any(slope) for slope in jax.tree.leaves(slopes["tracked"]))
    assert np.any(slopes["kernel"])


def test_a_twin_that_a_token_does_not_see_has_neither_score_nor_logit_and_no_bias_brings_it_back():
    config = config_of(num_experts_per_tok=2, rebalance_interval=5, scoring_func="sigmoid")
    twins = {"twin": [0, 3, 2, 1], "twin_steps": [0, 1, 0, 1], "bias": [-9, 9, -9, 9]}
    found = decide(config, weights_of(config, kernel=KERNEL, **twins), same(X, 2), True)
    for position, (hidden, seen) in enumerate(((3, 1), (1, 3))):
        logits = np.where(np.arange(E) == hidden, -np.inf, X @ KERNEL)
        np.testing.assert_allclose(found.routed.logits_NE[position], logits, atol=1e-5)
        assert found.routed.scores_NE[position, hidden] == 0
        chosen = found.choices.experts_NK[position].tolist()
        assert chosen[0] == seen and chosen[1] in (0, 2)


def test_a_token_has_one_expert_at_least():
    for share in (0.0, 1e-6):
        config = config_of(num_experts_per_tok=3, dynamic_k=share)
        found = decide(config, weights_of(config, kernel=KERNEL), same(X, 3))
        assert np.asarray(found.choices.experts_NK)[:, 0].max() < E
        assert np.asarray(found.choices.experts_NK)[:, 1:].min() == E
        np.testing.assert_allclose(found.choices.weights_NK[:, 0], 1.0, rtol=1e-6)


@pytest.mark.parametrize("gate", ["linear", "context"])
def test_routers_compute_in_float32_whatever_the_compute_dtype(gate):
    """Logits of bfloat16 tokens are those of float64 to seven digits; of a bfloat16 product two or three are right."""
    config = dataclasses.replace(config_of(gate=gate), compute_dtype="bfloat16")
    x = jax.random.normal(jax.random.key(1), (1, 9, D)).astype(jnp.bfloat16)
    weights = weights_of(config)
    leaves, tree = jax.tree.flatten(weights)
    random = np.random.default_rng(4)
    weights = tree.unflatten(
        [jax.device_put(np.asarray(a + random.standard_normal(a.shape), np.float32)) for a in leaves]
    )
    found = decide(config, weights, x)
    assert found.routed.logits_NE.dtype == found.choices.weights_NK.dtype == found.temperature.dtype == jnp.float32
    wide = jax.tree.map(np.float64, weights)
    for t, token in enumerate(np.float64(x[0])):
        expected = numpy_decoder.gate(config, wide, token, t, np.zeros(D))
        np.testing.assert_allclose(found.routed.logits_NE[t], expected, rtol=2e-5, atol=2e-5)


def test_a_gate_with_history_needs_the_state_that_a_cache_begins_with():
    model, params = make("experts in every second layer, by context, priority and temperature")
    with pytest.raises(ValueError) as error:
        model.apply({"params": params}, Inputs(some_tokens(1, 3)), State(make_cache(model.config, 1, 8)))
    assert str(error.value) == ("the gates read the history of a text, which the state lacks: begin with State.empty")


@pytest.mark.parametrize("noise", mostly_slow(NOISES, "gumbel"))
def test_noise_differs_by_layer_step_and_part_and_repeats_with_seed_and_step(noise, monkeypatch):
    """All layers of all parts have the same logits: what differs is noise."""
    seen = []

    def recorded(scores_NE, *args, **kwargs):
        jax.debug.callback(lambda x: seen.append(np.asarray(x).tobytes()), scores_NE)
        return choose(scores_NE, *args, **kwargs)

    choose = router_module.choose_experts
    model_config = dataclasses.replace(BASE, moe={"num_experts": E, **NOISES[noise]}, num_hidden_layers=2)
    config = settings(model=model_config, gradient_accumulation_steps=2, loss=LossConfig(router_load=0.0))
    model = ByteTransformer(model_config)
    batch = {name: np.concatenate([x[:2], x[:2]]) for name, x in packed_batch().items()}
    batch["tokens"] %= BASE.vocab_size
    state = jax.jit(lambda: create_state(config, model, RECORDER))()
    kernel = state.params["layers"]["0"]["moe"]["router"]
    kernel["kernel"] = jnp.zeros_like(kernel["kernel"])
    monkeypatch.setattr(router_module, "choose_experts", recorded)
    seeds = [dataclasses.replace(config, seed=seed) for seed in (0, 1)]
    steps = [jax.jit(make_train_step(c, model, RECORDER, lambda _: 0.0)) for c in seeds]

    def scores(seed, number):
        seen.clear()
        jax.block_until_ready(steps[seed](state.replace(step=jax.device_put(np.asarray(number, np.int32))), batch))
        jax.effects_barrier()
        return set(seen)

    found = scores(0, 0)
    assert len(found) == 4, "of two layers and two parts"
    assert scores(0, 0) == found
    assert len(found | scores(0, 1)) == 8
    if noise == "gumbel":  # another program for each seed
        assert len(found | scores(1, 0)) == 8

"""Steps of networks with experts: every balance loss is in the loss and its gradient, routers keep what they should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.dense_experts import total_loss
from helpers.training import (
    MODEL,
    RECORDER,
    assert_close,
    compiled_step,
    first_state,
    flat,
    nested,
    packed_batch,
    settings,
)

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.training import step as step_module
from stellarbyte_jax.training.loss import batch_loss
from stellarbyte_jax.training.telemetry import LOADS

E = 4
TYPES = ("full_attention", *("sliding_attention", "full_attention") * 2, "sliding_attention")
# A dense layer; two turns of a scan over layers with a window and without; and one layer after it.
EXPERTS = dataclasses.replace(
    MODEL,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    layer_types=TYPES,
    sliding_window=3,
    moe={"num_experts": E, "intermediate_size": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
)
SMALL = dataclasses.replace(
    MODEL,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=8,
    moe={"num_experts": E},
)
NAMES = [name for name in LossConfig.__dataclass_fields__ if name.startswith("router_")]


def metric(name):
    """The metric of the loss whose weight has this name."""
    return name.replace("router_", "router/loss/")


ALL = LossConfig(**{name: 0.1 * (number + 1) for number, name in enumerate(NAMES)})


def with_experts(loss=ALL, parts=1, model=EXPERTS, **moe):
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **moe))
    return settings(model=model, loss=loss, gradient_accumulation_steps=parts)


def first(config, bias=0.0):
    """A state whose routers prefer some experts; all of its weights are other ones than at the start."""
    state = first_state(dataclasses.replace(config, loss=LossConfig(), gradient_accumulation_steps=1), RECORDER)
    random = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x + 0.2 * random.standard_normal(x.shape).astype(np.float32), state.params)
    frozen = flat(state.frozen)
    for path, x in frozen.items():
        if path.endswith("tracked/bias"):
            frozen[path] = x + bias * random.standard_normal(x.shape).astype(np.float32)
    return state.replace(params=params, frozen=nested(frozen))


@functools.cache
def dense(parts):
    """Loss, balance losses and gradients of the loop over layers and experts."""
    config = with_experts(parts=parts)
    state, batch = first(config, bias=0.05), packed_batch()
    batch = {name: jnp.asarray(x) for name, x in batch.items()}

    def loss(params):
        weights = nested({**flat(params), **flat(state.frozen)})
        return total_loss(config, weights, batch, parts)

    (value, (told, counts)), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    return value, told, counts, slopes


ROOM = {"dispatch": "capacity", "capacity_factor": float(E)}  # for all


@pytest.mark.parametrize(
    ("remat", "parts", "dispatch"),
    [("none", 1, {}), ("none", 2, {}), ("dots", 2, {}), ("full", 2, {}), ("full", 2, ROOM)],
)
def test_balance_losses_and_their_gradients_are_those_of_a_dense_loop(remat, parts, dispatch):
    config = with_experts(parts=parts, model=dataclasses.replace(EXPERTS, remat=remat), **dispatch)
    after, metrics = compiled_step(config, RECORDER)(first(config, bias=0.05), packed_batch())
    value, told, _, slopes = dense(parts)
    for name in NAMES:
        assert float(metrics[metric(name)]) == pytest.approx(float(told[name]), rel=1e-4), name
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["loss"]) > float(metrics["cross_entropy"]) + 1
    assert_close(after.opt_state, slopes, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("moe", "taught"),
    [
        ({"num_experts_per_tok": 1}, False),  # of which begin.tell_routers_without_slope tells
        ({"num_experts_per_tok": 1, "norm_topk_prob": False}, True),
        ({}, True),
    ],
)
def test_the_cross_entropy_teaches_routers_but_where_the_weight_is_always_one(moe, taught):
    config = with_experts(LossConfig(router_load=0.0), model=SMALL, **moe)
    state = first(config)
    gradient = flat(compiled_step(config, RECORDER)(state, packed_batch())[0].opt_state)
    largest = float(jnp.max(jnp.abs(gradient["layers/0/moe/router/kernel"])))
    assert largest > 1e-4 if taught else largest < 1e-7, "what is left is rounding"


def test_a_pool_gets_the_gradients_of_all_its_layers():
    config = with_experts(model=dataclasses.replace(SMALL, num_hidden_layers=2), shared_pool=True)
    state, batch = first(config), packed_batch()
    after, metrics = compiled_step(config, RECORDER)(state, batch)
    batch = {name: jnp.asarray(x) for name, x in batch.items()}

    def loss(params):
        return total_loss(config, nested({**flat(params), **flat(state.frozen)}), batch, 1)[0]

    value, slopes = jax.jit(jax.value_and_grad(loss))(state.params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert_close(after.opt_state, slopes, atol=2e-5, rtol=1e-4)
    assert "layers/pool/down" in flat(slopes)


def test_loads_of_earlier_parts_are_in_the_global_loss_and_forgotten_after_the_step():
    """The only loss that parts change is that with the counts of all of them; the next step begins from none."""
    config = with_experts(parts=2)
    step, state = compiled_step(config, RECORDER), first(config, bias=0.05)
    after, metrics = step(state, packed_batch())
    halves = []
    for part in range(2):
        twice = {name: np.repeat(x[part::2], 2, axis=0) for name, x in packed_batch().items()}
        halves.append(step(state, twice)[1])
    for name in NAMES:
        mean = np.mean([float(half[metric(name)]) for half in halves])
        same = float(metrics[metric(name)]) == pytest.approx(mean, rel=1e-5)
        assert same == (name != "router_global"), name
    again = step(after.replace(step=state.step), packed_batch())[1]
    for name in NAMES:
        assert float(again[metric(name)]) == float(metrics[metric(name)]), name


def tracked(state):
    """What routers keep, by name, over all layers."""
    of_stack = {path.rsplit("/", 1)[1]: np.asarray(x) for path, x in flat(state.frozen).items() if "/tracked/" in path}
    assert set(of_stack) == {"load", "utilization", "priority", "bias", "coldness", "steps"}
    return of_stack


def test_the_bias_goes_up_for_experts_with_few_tokens_and_down_for_those_with_many():
    """Three steps of two parts. Choices with a bias are those of the dense loop, and so are the weights without it."""
    config = with_experts(parts=2, bias_update_rate=0.02)
    step, state = compiled_step(config, RECORDER), first(config)
    assert not tracked(state)["bias"].any()
    expected = tracked(state)["bias"]
    seen = []
    for number in range(3):
        batch = {name: jnp.asarray(x) for name, x in packed_batch(number).items()}
        weights = nested({**flat(state.params), **flat(state.frozen)})
        value, (_, counts) = total_of(config, weights, batch)
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
        expected = expected + 0.02 * np.sign(np.mean(counts, axis=1, keepdims=True) - counts)
        np.testing.assert_allclose(tracked(state)["bias"], expected, atol=1e-6)
        assert tracked(state)["steps"].tolist() == [number + 1] * 5
        seen.append(np.asarray(counts))
    assert np.abs(expected).max() == pytest.approx(0.06) and len({x.tobytes() for x in seen}) == 3


@functools.partial(jax.jit, static_argnums=0)
def total_of(config, weights, batch):
    return total_loss(config, weights, batch, config.gradient_accumulation_steps)


@pytest.mark.parametrize("moe", [{"decoder_sparse_step": 2}, {"mlp_only_layers": (1, 2, 5)}])
def test_layers_between_dense_ones_are_counted_in_their_order_once_however_activations_are_kept(moe):
    """Choices of each layer, of all parts and of tokens alone, where layers are computed again for their gradients."""
    model = dataclasses.replace(EXPERTS, remat="full", moe={"num_experts": E, "intermediate_size": 8, **moe})
    config, batch = with_experts(parts=2, model=model, bias_update_rate=0.01), packed_batch(3)
    state = first(config, bias=0.05)
    weights = nested({**flat(state.params), **flat(state.frozen)})
    value, (_, counts) = total_of(config, weights, {name: jnp.asarray(x) for name, x in batch.items()})
    after, metrics = compiled_step(config, RECORDER)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert counts.sum(1).tolist() == [2 * (batch["segment_ids"] > 0).sum()] * 3
    np.testing.assert_allclose(metrics[LOADS], counts / counts.sum(1, keepdims=True), atol=1e-6)
    moved = np.concatenate([x - flat(state.frozen)[p] for p, x in flat(after.frozen).items() if p.endswith("/bias")])
    np.testing.assert_allclose(moved, 0.01 * np.sign(np.mean(counts, axis=1, keepdims=True) - counts), atol=1e-6)
    assert len({x.tobytes() for x in np.asarray(counts)}) == 3


def padded(batch, rows):
    """The batch with nothing but padding in these rows, as at the end of the data."""
    kept = {name: x.copy() for name, x in batch.items()}
    for name in ("segment_ids", "positions", "loss_mask"):
        kept[name][rows] = 0
    return kept


def test_parts_of_padding_alone_do_not_dilute_losses_of_balance():
    """Loss, gradients and metrics are those of the rows with text alone."""
    config, batch = with_experts(parts=2), packed_batch()
    state = first(config, bias=0.05)
    after, metrics = compiled_step(config, RECORDER)(state, padded(batch, slice(1, None, 2)))
    text = {name: jnp.asarray(x[::2]) for name, x in batch.items()}

    def loss(params):
        return total_loss(config, nested({**flat(params), **flat(state.frozen)}), text, 1)

    (value, (told, _)), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    for name in NAMES:
        assert float(metrics[metric(name)]) == pytest.approx(float(told[name]), rel=1e-4), name
    assert_close(after.opt_state, slopes, atol=2e-5, rtol=1e-4)


def test_a_step_of_padding_alone_leaves_what_routers_keep():
    config = with_experts(model=SMALL, parts=2, bias_update_rate=0.1, cooling_steps=3)
    state = uneven(config)
    after, metrics = compiled_step(config, RECORDER)(state, padded(packed_batch(), slice(None)))
    assert metrics["finite"] and np.isfinite([float(metrics[metric(name)]) for name in NAMES]).all()
    for name, x in tracked(after).items():
        np.testing.assert_array_equal(x, tracked(state)[name] + (name == "steps"), err_msg=name)


def uneven(config):
    """A state whose router sends nearly all tokens to two experts."""
    state = first(config)
    params = flat(state.params)
    path = "layers/0/moe/router/kernel"
    weights = np.random.default_rng(1).standard_normal(params[path].shape).astype(np.float32)
    params[path] = 0.1 * weights
    params["layers/0/mlp_norm/scale"] = np.ones_like(params["layers/0/mlp_norm/scale"])
    frozen = flat(state.frozen)
    frozen["layers/0/moe/router/tracked/bias"] = np.float32([[0.4, 0.3, -0.1, -0.2]])
    return state.replace(params=nested(params), frozen=nested(frozen))


def spread(config, steps):
    """The largest load over the mean one, averaged over the first and the last ten steps."""
    state, step = uneven(config), compiled_step(config, RECORDER)
    found = []
    for number in range(steps):
        state, _ = step(state, packed_batch(number % 7))
        found.append(tracked(state)["load"].max() * E)
    return np.mean(found[:10]), np.mean(found[-10:])


def test_the_bias_alone_makes_uneven_loads_even():
    config = with_experts(LossConfig(router_load=0.0), model=SMALL, bias_update_rate=0.02, state_decay=0.5)
    before, after = spread(config, 60)
    assert before > 1.6 and after < 1.3
    still = spread(with_experts(LossConfig(router_load=0.0), model=SMALL, state_decay=0.5), 20)
    assert still[1] > 1.6, "without it they stay uneven"


def test_a_step_that_is_not_finite_leaves_what_routers_keep(monkeypatch):
    def broken(*args, **kwargs):
        total, sums, out = batch_loss(*args, **kwargs)
        return total + jnp.where(args[2]["tokens"][0, 0] == 0, jnp.nan, 0.0), sums, out

    monkeypatch.setattr(step_module, "batch_loss", broken)
    config = with_experts(LossConfig(), model=SMALL, parts=2, bias_update_rate=0.1, cooling_steps=3)
    model = ByteTransformer(config.model)
    step = jax.jit(step_module.make_train_step(config, model, RECORDER, lambda step: 0.0))
    state, batch = uneven(config), packed_batch()
    for token, changes in ((0, False), (1, True)):
        batch["tokens"][:, 0] = token
        after, metrics = step(state, batch)
        assert bool(metrics["finite"]) == changes
        for name, x in tracked(after).items():
            assert np.any(x != tracked(state)[name]) == changes, name


def test_validation_and_generation_neither_count_nor_change_what_routers_keep():
    config = with_experts(LossConfig(), model=SMALL)
    state, batch = uneven(config), {name: jnp.asarray(x) for name, x in packed_batch().items()}
    model, weights = ByteTransformer(config.model), nested({**flat(state.params), **flat(state.frozen)})
    evaluate = jax.jit(step_module.make_eval_step(config, model, None))
    assert evaluate(weights, batch, State())[1] == State()
    found = jax.jit(lambda x: forward(model, weights, Inputs(x), State.empty(config.model, 4, 16)).state)(
        batch["tokens"]
    )
    assert found.router is None

"""Steps of networks with experts: every balance loss is in the loss and its gradient, routers keep what they should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.dense_experts import total_loss
from helpers.grids import REPEATS
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

from stellarbyte_jax.config import LossConfig, MoEConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.training import step as step_module
from stellarbyte_jax.training.loss import batch_loss
from stellarbyte_jax.training.telemetry import LOADS

E = 4
# A dense layer, and two turns of a scan over layers with experts.
EXPERTS = dataclasses.replace(
    MODEL,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe={"num_experts": E, "intermediate_size": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
)
# Two turns of a layer with experts and a dense one with a window, and one more with experts: all have the same ones.
DEEP = dataclasses.replace(
    EXPERTS,
    num_hidden_layers=5,
    layer_types=("full_attention", *("sliding_attention", "full_attention") * 2),
    sliding_window=3,
    remat="full",
    moe=MoEConfig(num_experts=E, intermediate_size=8, mlp_only_layers=(1, 3), shared_pool=True),
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


# How routers change what they keep changes no loss of a step: all tests of a model share its programs.
KEEPS = {"bias_update_rate": 0.02, "state_decay": 0.5, "cooling_steps": 3}


def with_experts(parts=1, model=EXPERTS, **moe):
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **KEEPS, **moe))
    return settings(model=model, loss=ALL, gradient_accumulation_steps=parts)


def first(config, bias=0.0):
    """A state whose routers prefer some experts; all of its weights are other ones than at the start."""
    moe = dataclasses.replace(config.model.moe, dispatch="dropless", capacity_factor=MoEConfig().capacity_factor)
    plain = dataclasses.replace(config.model, remat="none", moe=moe)
    state = first_state(settings(model=plain), RECORDER)
    random = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x + 0.2 * random.standard_normal(x.shape).astype(np.float32), state.params)
    frozen = flat(state.frozen)
    for path, x in frozen.items():
        if path.endswith("tracked/bias"):
            frozen[path] = x + bias * random.standard_normal(x.shape).astype(np.float32)
    return state.replace(params=params, frozen=nested(frozen))


def loop(config, state, batch, parts=None):
    """Loss, balance losses, counts of choices, and gradients of the loop over layers and experts."""
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    (value, (told, counts)), slopes = of_loop(plain, parts or config.gradient_accumulation_steps, state, batch)
    return float(value), told, np.asarray(counts), slopes


@functools.partial(jax.jit, static_argnums=(0, 1))
def of_loop(config, parts, state, batch):
    def loss(params):
        return total_loss(config, nested({**flat(params), **flat(state.frozen)}), batch, parts)

    return jax.value_and_grad(loss, has_aux=True)(state.params)


def check(found, expected):
    """Losses and gradients of a step."""
    (after, metrics), (value, told, _, slopes) = found, expected
    for name in NAMES:
        assert float(metrics[metric(name)]) == pytest.approx(float(told[name]), rel=1e-4), name
    assert float(metrics["loss"]) == pytest.approx(value, rel=1e-5)
    assert_close(after.opt_state, slopes, atol=2e-5, rtol=1e-4)


ROOM = {"dispatch": "capacity", "capacity_factor": float(E)}  # for all


@pytest.mark.parametrize(
    ("model", "remat", "parts", "dispatch"),
    [
        (EXPERTS, "none", 1, {}),
        pytest.param(EXPERTS, "none", 2, {}, marks=REPEATS),
        (EXPERTS, "dots", 2, {}),
        (EXPERTS, "full", 2, ROOM),
        (DEEP, "full", 2, {}),
    ],
    ids=["none", "parts", "dots", "room", "deep"],
)
def test_balance_losses_and_their_gradients_are_those_of_a_dense_loop(model, remat, parts, dispatch):
    config = with_experts(parts, dataclasses.replace(model, remat=remat), **dispatch)
    state, batch = first(config, bias=0.05), packed_batch()
    found = compiled_step(config, RECORDER)(state, batch)
    expected = loop(with_experts(parts, model), state, batch)
    check(found, expected)
    assert float(found[1]["loss"]) > float(found[1]["cross_entropy"]) + 1
    assert model is not DEEP or "layers/pool/down" in flat(expected[3])


@pytest.mark.parametrize(
    ("moe", "taught"),
    [
        ({"num_experts_per_tok": 1}, False),  # of which begin.tell_routers_without_slope tells
        ({"num_experts_per_tok": 1, "norm_topk_prob": False}, True),
    ],
)
def test_the_cross_entropy_teaches_routers_but_where_the_weight_is_always_one(moe, taught):
    config = with_experts(model=SMALL, **moe)
    state, batch = first(with_experts(model=SMALL)), {name: jax.device_put(x) for name, x in packed_batch().items()}

    @jax.jit
    @jax.grad
    def slopes(params):
        weights = nested({**flat(params), **flat(state.frozen)})
        total, sums, _ = batch_loss(ByteTransformer(config.model), weights, batch, LossConfig())
        return total / sums["tokens"]

    largest = float(jnp.max(jnp.abs(flat(slopes(state.params))["layers/0/moe/router/kernel"])))
    assert largest > 1e-4 if taught else largest < 1e-7, "what is left is rounding"


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
    again = step(after.replace(step=state.step, frozen=state.frozen), packed_batch())[1]
    for name in NAMES:
        assert float(again[metric(name)]) == float(metrics[metric(name)]), name


def tracked(state):
    """What routers keep, by name, over all layers."""
    of_stack = {path.rsplit("/", 1)[1]: np.asarray(x) for path, x in flat(state.frozen).items() if "/tracked/" in path}
    assert set(of_stack) == {"load", "utilization", "priority", "bias", "coldness", "steps"}
    return of_stack


def test_the_bias_goes_up_for_experts_with_few_tokens_and_down_for_those_with_many():
    """Three steps of two parts. Choices with a bias are those of the dense loop, and so are the weights without it."""
    config = with_experts(parts=2)
    step, state = compiled_step(config, RECORDER), first(config)
    assert not tracked(state)["bias"].any()
    expected = tracked(state)["bias"]
    seen = []
    for number in range(3):
        value, _, counts, _ = loop(config, state, packed_batch(number))
        state, metrics = step(state, packed_batch(number))
        assert float(metrics["loss"]) == pytest.approx(value, rel=1e-5)
        expected = expected + 0.02 * np.sign(np.mean(counts, axis=1, keepdims=True) - counts)
        np.testing.assert_allclose(tracked(state)["bias"], expected, atol=1e-6)
        assert tracked(state)["steps"].tolist() == [number + 1] * 2
        seen.append(counts)
    assert np.abs(expected).max() == pytest.approx(0.06) and len({x.tobytes() for x in seen}) == 3


def test_layers_between_dense_ones_are_counted_in_their_order_once():
    """Choices of each layer, of all parts and of tokens alone, where layers are computed again for their gradients."""
    config, batch = with_experts(parts=2, model=DEEP), packed_batch(3)
    state = first(config, bias=0.05)
    _, _, counts, _ = loop(config, state, batch)
    after, metrics = compiled_step(config, RECORDER)(state, batch)
    assert counts.sum(1).tolist() == [2 * (batch["segment_ids"] > 0).sum()] * 3
    np.testing.assert_allclose(metrics[LOADS], counts / counts.sum(1, keepdims=True), atol=1e-6)
    moved = np.concatenate([x - flat(state.frozen)[p] for p, x in flat(after.frozen).items() if p.endswith("/bias")])
    np.testing.assert_allclose(moved, 0.02 * np.sign(np.mean(counts, axis=1, keepdims=True) - counts), atol=1e-6)
    assert len({x.tobytes() for x in counts}) == 3


def padded(batch, rows):
    """The batch with nothing but padding in these rows, as at the end of the data."""
    kept = {name: x.copy() for name, x in batch.items()}
    for name in ("segment_ids", "positions", "loss_mask"):
        kept[name][rows] = 0
    return kept


def test_parts_of_padding_alone_do_not_dilute_losses_of_balance():
    """Loss, gradients and metrics are those of the rows with text alone, of which the loop has each twice."""
    config, batch = with_experts(parts=2), packed_batch()
    state = first(config, bias=0.05)
    found = compiled_step(config, RECORDER)(state, padded(batch, slice(1, None, 2)))
    check(found, loop(with_experts(), state, {name: np.repeat(x[::2], 2, axis=0) for name, x in batch.items()}))


# What routers keep from step to step is looked at in one layer, whose steps all tests share.
KEPT = with_experts(parts=2, model=SMALL)


def test_a_step_of_padding_alone_leaves_what_routers_keep():
    state = uneven()
    after, metrics = compiled_step(KEPT, RECORDER)(state, padded(packed_batch(), slice(None)))
    assert metrics["finite"] and np.isfinite([float(metrics[metric(name)]) for name in NAMES]).all()
    for name, x in tracked(after).items():
        np.testing.assert_array_equal(x, tracked(state)[name] + (name == "steps"), err_msg=name)


def uneven():
    """A state whose router sends nearly all tokens to two experts."""
    state = first(KEPT)
    params = flat(state.params)
    path = "layers/0/moe/router/kernel"
    weights = np.random.default_rng(1).standard_normal(params[path].shape).astype(np.float32)
    params[path] = 0.1 * weights
    params["layers/0/mlp_norm/scale"] = np.ones_like(params["layers/0/mlp_norm/scale"])
    return with_bias(state.replace(params=nested(params)), np.float32([[0.4, 0.3, -0.1, -0.2]]))


def with_bias(state, bias):
    return state.replace(frozen=nested({**flat(state.frozen), "layers/0/moe/router/tracked/bias": bias}))


def spread(steps, keep):
    """The largest load over the mean one, averaged over the first and the last ten steps."""
    first_one, step = uneven(), compiled_step(KEPT, RECORDER)
    state, found = first_one, []
    for number in range(steps):
        state, _ = step(state, packed_batch(number % 7))
        found.append(tracked(state)["load"].max() * E)
        if not keep:
            state = with_bias(state, tracked(first_one)["bias"])
    return np.mean(found[:10]), np.mean(found[-10:])


def test_the_bias_alone_makes_uneven_loads_even():
    before, after = spread(60, keep=True)
    assert before > 1.6 and after < 1.3
    assert spread(20, keep=False)[1] > 1.6, "without it they stay uneven"


def test_a_step_that_is_not_finite_leaves_what_routers_keep():
    """Where one token's row of the table is no number."""
    state, batch = uneven(), packed_batch()
    table = np.array(state.params["embed"]["embedding"])
    table[0] = np.nan
    state = state.replace(params={**state.params, "embed": {"embedding": table}})
    batch["tokens"] = np.maximum(batch["tokens"], 1)
    for token, changes in ((0, False), (1, True)):
        batch["tokens"][:, 0] = token
        after, metrics = compiled_step(KEPT, RECORDER)(state, batch)
        assert np.isfinite(metrics["loss"]) == changes
        for name, x in tracked(after).items():
            assert np.any(x != tracked(state)[name]) == changes, name


def test_validation_and_generation_neither_count_nor_change_what_routers_keep():
    model, state = ByteTransformer(KEPT.model), first(KEPT)
    batch = {name: jax.device_put(x) for name, x in packed_batch().items()}
    weights = nested({**flat(state.params), **flat(state.frozen)})
    evaluate = step_module.make_eval_step(KEPT, model, None)
    assert jax.eval_shape(evaluate, weights, batch, State())[1] == State()
    found = jax.eval_shape(
        lambda x: forward(model, weights, Inputs(x), State.empty(KEPT.model, 4, 16)), batch["tokens"]
    )
    assert found.state.router is None

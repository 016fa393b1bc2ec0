"""Weights in two trees: splitting and joining them, and steps that change one tree alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.grids import mostly_slow
from helpers.training import (
    MODEL,
    RECORDER,
    assert_close,
    first_state,
    flat,
    nested,
    packed_batch,
    rate_at,
    settings,
    start,
)
from helpers.update_rules import AdamW, clipped

from stellarbyte_jax.config import LossConfig, OptimizerConfig
from stellarbyte_jax.inspect.costs import count_parameters
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import all_trainable, merge, partition
from stellarbyte_jax.training.loss import batch_loss, next_token_targets

TREES = [
    {},
    {"a": 1},
    {"a": {"b": 1, "c": 2}, "d": 3},
    {"a": {"b": {"c": 1, "d": 2}, "e": 3}, "f": {"b": {"c": 4}}, "g": 5},
]
RULES = {
    "all": all_trainable,
    "none": lambda path: False,
    "by the last name": lambda path: path[-1] in ("b", "c"),
    "by the first name": lambda path: path[0] == "a",
    "by the whole path": lambda path: path == ("a", "b", "c"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_merge_undoes_partition(tree, rule):
    trainable, frozen = partition(tree, rule)
    assert merge(trainable, frozen) == merge(frozen, trainable) == tree
    paths = {tuple(path.split("/")) for path in flat(tree)}
    assert {tuple(path.split("/")) for path in flat(trainable)} == {path for path in paths if rule(path)}
    assert {tuple(path.split("/")) for path in flat(frozen)} == {path for path in paths if not rule(path)}


def test_dicts_without_weights_are_left_out():
    assert partition({"a": {"b": {"c": 1}}, "d": 2}, lambda path: path[0] == "d") == ({"d": 2}, {"a": {"b": {"c": 1}}})


def test_merge_leaves_its_arguments_alone():
    trainable, frozen = {"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}
    merge(trainable, frozen)
    assert (trainable, frozen) == ({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3})


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [({"a": {"b": 1}}, {"a": {"b": 1}}), ({"a": 1}, {"a": {"b": 1}}), ({"a": {"b": 1}}, {"a": 1})],
)
def test_a_weight_in_both_trees_is_an_error(trainable, frozen):
    with pytest.raises(ValueError, match="both trainable and frozen"):
        merge(trainable, frozen)


def not_embedding(path):
    return path[0] != "embed"


def attention_alone(path):
    return "attn" in path


CASES = {
    "adamw": ({}, not_embedding),
    "muon": ({"optimizer": OptimizerConfig(name="muon", learning_rate=1e-2)}, not_embedding),
    "accumulation, ema, some weights of a layer": (
        {"gradient_accumulation_steps": 2, "ema_decay": 0.5},
        attention_alone,
    ),
}


@pytest.mark.parametrize("case", mostly_slow(CASES, "muon", "accumulation, ema, some weights of a layer"))
def test_frozen_weights_stay_and_cost_nothing(case):
    """Bit-equal after steps that move all others; neither optimizer nor average stores anything of them."""
    changes, is_trainable = CASES[case]
    config = settings(**changes)
    first, step = start(config, is_trainable=is_trainable)
    full = first_state(settings())
    assert set(flat(first.params)) == {p for p in flat(full.params) if is_trainable(tuple(p.split("/")))}
    assert set(flat(first.frozen)) == set(flat(full.params)) - set(flat(first.params))
    state = first
    for seed in range(3):
        state, _ = step(state, packed_batch(seed))
    for path, weight in flat(state.frozen).items():
        np.testing.assert_array_equal(weight, flat(first.frozen)[path], err_msg=path)
    for path, weight in flat(jax.device_get(state.params)).items():
        assert np.all(np.any(weight != np.asarray(flat(first.params)[path]), axis=-1)), path

    trained = count_parameters(first.params)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    averages = 2 * trained
    if config.optimizer.name == "muon":  # Newton-Schulz coefficients, and one average of each hidden matrix
        hidden = sum(w.size for path, w in flat(first.params).items() if path.startswith("layers") and w.ndim > 2)
        averages += 3 - hidden
    assert count_parameters(moments) == averages
    assert (state.ema is None) == (config.ema_decay is None)
    if state.ema is not None:
        assert set(flat(state.ema)) == set(flat(state.params))


@pytest.mark.parametrize("parts", mostly_slow([1, 2], 2))
def test_the_others_learn_as_if_its_gradient_were_left_out(parts):
    """Three steps against AdamW in numpy on the gradient of the whole model; clipping and norm leave it out too."""
    config = settings(gradient_accumulation_steps=parts, optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3))
    model = ByteTransformer(config.model)
    state, step = start(config, is_trainable=not_embedding)
    whole_state, whole_step = start(settings(), RECORDER)
    embedding = flat(state.frozen)
    weights = {path: np.float64(w) for path, w in flat(state.params).items()}
    o = config.optimizer
    rule = AdamW(o.b1, o.b2, o.eps, o.weight_decay, {path for path, w in weights.items() if "norm" not in path})

    @jax.jit
    def gradient(params, batch):
        def mean_loss(params):
            return batch_loss(model, params, batch, LossConfig())[0] / jnp.sum(next_token_targets(batch) >= 0).astype(
                jnp.float32
            )

        return jax.grad(mean_loss)(params)

    for number in range(3):
        batch = packed_batch(number)
        params = nested({path: np.float32(w) for path, w in weights.items()} | embedding)
        grads = flat(gradient(params, batch))
        del grads["embed/embedding"]
        norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads.values()))
        assert norm > o.gradient_clip_norm or number  # the first is clipped
        weights = rule.step(weights, clipped(grads, o.gradient_clip_norm), float(rate_at(config, number)))
        state, metrics = step(state, batch)
        assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
        if number == 0:
            whole = whole_step(whole_state, batch)[1]
            assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
            assert float(whole["gradient_norm"]) > norm * 1.01
    assert_close(state.params, nested(weights), rtol=1e-4, atol=1e-5)


def test_a_tied_table_is_frozen_in_both_uses():
    config = settings(model=dataclasses.replace(MODEL, tie_word_embeddings=True))
    state, step = start(config, RECORDER, not_embedding)
    whole, whole_step = start(config, RECORDER)
    grads, whole_grads = (flat(f(s, packed_batch())[0].opt_state) for f, s in ((step, state), (whole_step, whole)))
    assert set(whole_grads) - set(grads) == {"embed/embedding"}
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, whole_grads[path], atol=1e-7, err_msg=path)


def test_frozen_weights_keep_their_dtype():
    state, step = start(settings(), is_trainable=not_embedding)
    state = state.replace(frozen=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.frozen))
    after, metrics = step(state, packed_batch())
    table, before = (s.frozen["embed"]["embedding"] for s in (after, state))
    assert table.dtype == jnp.bfloat16 and jnp.array_equal(table, before)
    assert np.isfinite(float(metrics["loss"]))
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert jax.jit(optax.tree.norm)(after.params) > 0

"""float16: gradients that underflow without a factor of the loss, steps that overflow, and the factor over a run."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import cli, same_weights
from helpers.training import MODEL, RECORDER, compiled_step, first_state, packed_batch, rate_at, settings, start
from helpers.variants import make, slopes_of_nll, some_tokens, weights_alone

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.config import LossScaleConfig
from stellarbyte_jax.config.section import ConfigError
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training.loss_scale import LossScale
from stellarbyte_jax.training.step import make_train_step

HALF = dataclasses.replace(MODEL, compute_dtype="float16")


def half(initial=65536.0, growth_interval=2000, **changes):
    return settings(model=HALF, loss_scale=LossScaleConfig(initial=initial, growth_interval=growth_interval), **changes)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def gradients_of(config, weights):
    """Of all weights, as one vector."""
    state, step = start(config, RECORDER)
    batch = {name: jnp.asarray(x) for name, x in packed_batch().items()}
    after, _ = step(state.replace(params=weights), batch)
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(after.opt_state)])


def test_gradients_are_nearer_to_those_of_float32_with_a_larger_loss():
    weights = jax.tree.map(lambda x: x * 0.002, first_state(settings()).params)
    right = gradients_of(settings(), weights)

    def apart(initial):
        return np.linalg.norm(gradients_of(half(initial), weights) - right) / np.linalg.norm(right)

    assert apart(65536.0) < 0.002
    assert apart(1.0) > 0.02


@pytest.mark.parametrize(
    "variant", ["the original's own", "a dense layer, experts by sigmoid in groups, one shared, windows"]
)
def test_every_part_of_a_network_computes_in_float16(variant):
    found = []
    for dtype in ("float32", "float16"):
        model, weights = make(variant, compute_dtype=dtype)
        slopes = weights_alone(model, slopes_of_nll(weights, model, some_tokens(2, 16)))
        found.append(np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(slopes)]))
    wide, narrow = found
    assert np.linalg.norm(narrow - wide) < 3e-3 * np.linalg.norm(wide)


def test_the_factor_changes_nothing_but_rounding():
    config = half()
    state, step = start(config)
    wide, wide_step = start(settings())
    batch = {name: jnp.asarray(x) for name, x in packed_batch().items()}
    after, told = step(state, batch)
    _, told_wide = wide_step(wide, batch)
    for name in ("loss", "cross_entropy", "gradient_norm", "learning_rate"):
        assert float(told[name]) == pytest.approx(float(told_wide[name]), rel=2e-3)
    assert told["loss_scale"] == 65536 and told["skipped_steps"] == 0 and told["finite"]
    assert not same(after.params, state.params)
    assert "loss_scale" not in told_wide and wide.loss_scale is None


def test_a_step_that_overflows_is_left_out_and_the_factor_halved():
    config = half(initial=2.0**60, ema_decay=0.9)
    state, step = start(config)
    batch = {name: jnp.asarray(x) for name, x in packed_batch().items()}
    number = 0
    while True:
        after, told = step(state, batch)
        assert told["finite"] and np.isfinite(float(told["loss"]))
        if told["skipped_steps"] == number:
            break
        number += 1
        assert told["gradient_norm"] == 0
        assert after.step == state.step + 1 and after.loss_scale.factor == state.loss_scale.factor / 2
        for part in ("params", "opt_state", "ema", "frozen"):
            assert same(getattr(after, part), getattr(state, part))
        state = after
    assert 10 < number < 60
    assert told["loss_scale"] == 2.0 ** (60 - number) and told["gradient_norm"] > 0
    assert after.loss_scale.skipped == number == told["skipped_steps"]
    # The schedule goes by the steps that were done.
    assert float(told["learning_rate"]) == float(rate_at(config, 0))
    assert (
        float(step(after, batch)[1]["learning_rate"]) == float(rate_at(config, 1)) != float(rate_at(config, number + 1))
    )


def test_accumulation_is_scaled_once():
    batch = {name: jnp.asarray(x) for name, x in packed_batch().items()}
    parts = half(gradient_accumulation_steps=2)
    (state, step), (_, in_parts) = start(half()), start(parts)
    (_, whole), (_, cut) = step(state, batch), in_parts(state, batch)
    for name in ("loss", "gradient_norm"):
        assert float(cut[name]) == pytest.approx(float(whole[name]), rel=2e-3)


@pytest.mark.parametrize(
    ("factor", "since", "overflow", "after"),
    [
        (1024.0, 0, False, (1024.0, 1, 7)),
        (1024.0, 3, False, (1024.0, 4, 7)),
        (1024.0, 4, False, (2048.0, 0, 7)),
        (1024.0, 4, True, (512.0, 0, 8)),
        (1024.0, 1, True, (512.0, 0, 8)),
        (1.0, 1, True, (1.0, 0, 8)),
        (1.5, 1, True, (1.0, 0, 8)),
        (2.0**24, 4, False, (2.0**24, 0, 7)),
        (2.0**23, 4, False, (2.0**24, 0, 7)),
        (2.0**30, 4, False, (2.0**30, 0, 7)),
    ],
)
def test_the_factor_of_the_next_step(factor, since, overflow, after):
    scale = LossScale(jnp.float32(factor), jnp.int32(since), jnp.int32(7))
    found = scale.after(jnp.asarray(overflow), 5)
    assert (float(found.factor), int(found.since), int(found.skipped)) == after
    assert bool(scale.is_least) == (factor == 1)


def test_what_a_smaller_factor_cannot_mend_is_told(monkeypatch):
    """A gradient that is not finite with factor 1, and a loss that is not."""
    config = half(initial=1.0)
    state, batch = first_state(config), {name: jnp.asarray(x) for name, x in packed_batch().items()}
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params)
    _, told = compiled_step(config)(state.replace(params=bad), batch)
    assert not told["finite"] and not np.isfinite(float(told["loss"])) and told["skipped_steps"] == 0
    model = ByteTransformer(HALF)
    monkeypatch.setattr(optax.tree, "norm", lambda tree: jnp.asarray(jnp.inf))
    made = make_train_step(config, model, optax.sgd(0.1), lambda step: jnp.float32(0.1))
    _, told = jax.jit(made)(first_state(config, optax.sgd(0.1)), batch)
    assert not told["finite"] and np.isfinite(float(told["loss"])) and told["skipped_steps"] == 0
    assert told["gradient_norm"] == np.inf


def test_settings_of_the_factor_belong_to_float16():
    with pytest.raises(
        ConfigError, match=r"loss_scale\.initial would change nothing with model\.compute_dtype=float32"
    ):
        settings(loss_scale=LossScaleConfig(initial=8.0))
    with pytest.raises(ConfigError, match=r"loss_scale\.initial=0\.5 would lose small gradients: set 1 or more"):
        LossScaleConfig(initial=0.5)


HALF_RUN = ("model.compute_dtype=float16", "schedule.name=constant", "schedule.warmup_steps=0")
GROWING = (*HALF_RUN, "loss_scale.initial=4e6", "loss_scale.growth_interval=4")


def training_lines(run):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def test_a_run_goes_on_with_its_factor(config_file, tmp_path, capsys):
    """Begun with a factor that overflows, so that it is halved, and doubled again later."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(config_file, *GROWING, f"output_dir={whole}") == 0
    assert cli(config_file, *GROWING, f"output_dir={parts}", "steps=13") == 0
    assert cli(config_file, *GROWING, f"output_dir={parts}") == 0
    told = training_lines(whole)
    factors = [line["loss_scale"] for line in told]
    assert factors[0] == 4e6 and min(factors) < 4e6
    assert any(later == 2 * earlier for earlier, later in itertools.pairwise(factors))
    for name in ("loss", "loss_scale", "skipped_steps", "learning_rate"):
        assert [line[name] for line in training_lines(parts)] == [line[name] for line in told]
    assert same_weights(load_weights(whole)[1], load_weights(parts)[1])
    assert "skipped steps " in capsys.readouterr().out


def test_a_run_may_change_its_compute_dtype(config_file, tmp_path, capsys):
    run = tmp_path / "changed"
    for steps, dtype in ((7, "float32"), (14, "float16"), (20, "float32")):
        given = ("schedule.name=constant", "schedule.warmup_steps=0", f"model.compute_dtype={dtype}")
        assert cli(config_file, f"output_dir={run}", f"steps={steps}", *given) == 0
    told = training_lines(run)
    assert [("loss_scale" in line) for line in told] == [False] * 7 + [True] * 7 + [False] * 6
    assert told[7]["loss_scale"] == 65536
    capsys.readouterr()

"""The learning rate at exact steps, computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import compiled_step, first_state, packed_batch, rate_at, settings

from stellarbyte_jax.config import ScheduleConfig

COS_45 = 0.70710678  # of an eighth of a turn, a quarter of the way down a cosine
# In parts of the peak, at steps of a run, counted from 0, of which 4 warm up; the last one is the last of the run.
AFTER_WARMUP = {
    "constant": ({}, {4: 1.0, 12: 1.0, 20: 1.0}),
    "cosine": (
        {"final_ratio": 0.2},
        {4: 1.0, 8: 0.6 + 0.4 * COS_45, 12: 0.6, 16: 0.6 - 0.4 * COS_45, 20: 0.2},
    ),
    "linear": ({"final_ratio": 0.5}, {4: 1.0, 8: 0.875, 12: 0.75, 19: 0.53125, 20: 0.5}),
    # Falls over a fifth of the run, which is 4 steps.
    "wsd": ({"final_ratio": 0.1}, {4: 1.0, 15: 1.0, 16: 1.0, 17: 0.775, 18: 0.55, 19: 0.325, 20: 0.1}),
    "wsd, decay_steps": ({"final_ratio": 0.0, "decay_steps": 8}, {4: 1.0, 12: 1.0, 14: 0.75, 16: 0.5, 20: 0.0}),
    # Two cycles of 9 steps; each falls to the ratio of its own peak.
    "cosine_restarts": (
        {"final_ratio": 0.1, "cycles": 2, "cycle_decay": 0.5},
        {4: 1.0, 6: 0.55 + 0.45 * COS_45, 8: 0.55, 10: 0.55 - 0.45 * COS_45, 12: 0.1}
        | {13: 0.5, 15: 0.275 + 0.225 * COS_45, 17: 0.275, 19: 0.275 - 0.225 * COS_45, 21: 0.05},
    ),
    # 16 steps in three cycles: 5, 6 and 5.
    "cosine_restarts, uneven": (
        {"final_ratio": 0.0, "cycles": 3, "cycle_decay": 0.8},
        {4: 1.0, 6: 0.5, 8: 0.0, 9: 0.8, 14: 0.0, 15: 0.64, 17: 0.32, 19: 0.0},
    ),
}


def config_of(case, **changes):
    options = {"warmup_steps": 4, **AFTER_WARMUP[case][0], **changes}
    return settings(
        steps=max(AFTER_WARMUP[case][1]) + 1, schedule=ScheduleConfig(name=case.partition(",")[0], **options)
    )


def trace(config, steps):
    return [float(rate_at(config, step)) / config.optimizer.learning_rate for step in steps]


@pytest.mark.parametrize("case", AFTER_WARMUP)
def test_rate_at_exact_steps(case):
    """The warm-up's first step is not zero, and it ends at the peak, which is the first step after it."""
    expected = AFTER_WARMUP[case][1]
    assert trace(config_of(case), range(4)) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert trace(config_of(case), expected) == pytest.approx(list(expected.values()), abs=1e-6)


@pytest.mark.parametrize("case", ["cosine", "linear", "wsd", "cosine_restarts"])
def test_without_warmup_the_first_step_has_the_peak(case):
    assert trace(config_of(case, warmup_steps=0), [0]) == pytest.approx([1.0])


def test_the_fall_of_wsd_ends_with_the_run():
    """The default fifth, 4 steps, is more than the 2 that this warm-up leaves."""
    config = config_of("wsd", warmup_steps=18)
    assert trace(config, [17, 18, 19, 20]) == pytest.approx([18 / 19, 1.0, 0.55, 0.1], abs=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "cosine_restarts"])
@pytest.mark.parametrize(("steps", "warmup"), [(2, 0), (3, 0), (30, 5), (30, 28), (30, 29), (30, 30), (1000, 100)])
def test_the_last_step_has_the_final_rate_whatever_the_warmup(name, steps, warmup):
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, final_ratio=0.125)
    config = settings(steps=steps, schedule=schedule)
    rates = trace(config, range(steps))
    assert rates[-1] == pytest.approx(0.125, abs=1e-6)
    assert max(rates) == pytest.approx(1.0) and rates[0] == pytest.approx(1 / (min(warmup, steps) + 1), abs=1e-6)


@pytest.mark.parametrize("decay", [1, 2, 4])
def test_wsd_falls_over_the_steps_that_are_named(decay):
    schedule = ScheduleConfig(name="wsd", warmup_steps=5, decay_steps=decay, final_ratio=0.0)
    rates = trace(settings(steps=50, schedule=schedule), range(50))
    assert rates[5 : 50 - decay] == pytest.approx([1.0] * (45 - decay))
    assert rates[50 - decay :] == pytest.approx([1 - (i + 1) / decay for i in range(decay)], abs=1e-6)


def test_a_run_of_one_step_has_the_peak():
    assert trace(settings(steps=1, schedule=ScheduleConfig(warmup_steps=0)), [0]) == pytest.approx([1.0])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_counts_optimizer_steps(parts):
    """Whatever the accumulation: the reported rate, the optimizer's own counts, and how far weights move."""
    schedule = ScheduleConfig(name="linear", warmup_steps=3, final_ratio=0.2)
    config = settings(steps=8, schedule=schedule)
    state, step = first_state(config), compiled_step(dataclasses.replace(config, gradient_accumulation_steps=parts))
    found = []
    for _ in range(8):
        before = state
        state, metrics = step(state, packed_batch())
        found.append(float(metrics["learning_rate"]))
    expected = 0.01 * np.array([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert counts and set(counts) == {8} == {int(state.step)}
    moved = np.abs(state.params["lm_head"]["kernel"] - before.params["lm_head"]["kernel"]).max()
    assert 0.1 * expected[-1] < moved <= 1.5 * expected[-1]

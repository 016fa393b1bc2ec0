"""Steps are read one behind the device; pauses are no part of the speed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import settings

from stellarbyte_jax.config import LoggingConfig
from stellarbyte_jax.training import meter
from stellarbyte_jax.training.meter import DivergedError, Meter


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


def make(skipped=0):
    shown = []
    config = settings(steps=50, logging=LoggingConfig(interval=2))
    made = Meter(
        config,
        1000,
        lambda step, metrics, due: shown.append((step, metrics, due)),
        lambda: {"skipped_lines": skipped} if skipped else {},
    )
    return made, shown, config.global_batch_size * config.data.sequence_length


def test_a_step_is_read_when_the_next_one_was_pushed(clock):
    made, shown, _ = make()
    made.push(1, {"loss": jnp.float32(3)})
    assert shown == []
    made.push(2, {"loss": jnp.float32(2)})
    assert [(step, m["loss"], due) for step, m, due in shown] == [(1, 3.0, False)]
    clock.now += 1.0
    made.flush()
    made.flush()
    assert [(step, m["loss"], due) for step, m, due in shown[1:]] == [(2, 2.0, True)]
    assert made.last["loss"] == 2.0


def test_speed_counts_the_steps_since_the_last_line_without_pauses(clock):
    made, shown, tokens = make()
    for step in (1, 2, 3, 4):
        clock.now += 1.0
        made.push(step, {"loss": jnp.float32(3)})
        made.flush()
        with made.paused():
            clock.now += 100.0
    speeds = {step: m.get("tokens_per_second") for step, m, due in shown if due}
    np.testing.assert_allclose(list(speeds.values()), [tokens, tokens])
    assert made.rates == list(speeds.values())


def test_the_first_step_alone_has_no_speed(clock):
    made, shown, _ = make()
    clock.now += 30.0  # compiling
    made.push(1, {"loss": jnp.float32(3)})
    made.flush()
    assert "tokens_per_second" not in shown[0][1]


def test_skipped_lines_are_told_where_there_are_any(clock):
    for skipped in (0, 7):
        made, shown, _ = make(skipped)
        made.push(1, {"loss": jnp.float32(3)})
        made.flush()
        assert shown[0][1].get("skipped_lines", 0) == skipped


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ({"loss": np.nan}, "the loss is nan"),
        ({"loss": np.inf}, "the loss is inf"),
        ({"loss": 2.0, "gradient_norm": np.nan}, "the gradient norm is nan"),
        ({"loss": 2.0, "gradient_norm": 1.0, "finite": False}, "the update is not finite"),
    ],
    ids=str,
)
def test_what_is_no_number_ends_the_run(clock, numbers, found):
    made, shown, _ = make()
    made.push(7, {name: jax.device_put(x) for name, x in numbers.items()})
    with pytest.raises(DivergedError, match=rf"{found} at step 7\. .* lower optimizer.learning_rate"):
        made.flush()
    assert shown == []


def test_that_all_is_finite_is_not_shown(clock):
    made, shown, _ = make()
    made.push(1, {"loss": jnp.float32(3), "finite": jax.device_put(True)})
    made.flush()
    assert "finite" not in shown[0][1]


def test_a_vector_is_shown_entry_by_entry(clock):
    made, shown, _ = make()
    made.push(1, {"loss": jnp.float32(3), "load": jnp.asarray([0.25, 0.75])})
    made.flush()
    assert {name: x for name, x in shown[0][1].items() if "/" in name} == {"load/0": 0.25, "load/1": 0.75}


def test_speed_counts_no_padding(clock):
    made, shown, tokens = make()
    for step, padding in ((1, 0.0), (2, 0.0), (3, 0.25), (4, 0.75)):
        clock.now += 1.0
        made.push(step, {"loss": jnp.float32(3), "padding": jnp.float32(padding)})
    clock.now += 1.0
    made.flush()
    assert shown[3][1]["tokens_per_second"] == pytest.approx(tokens * (0.75 + 0.25) / 2)
    assert shown[3][1]["padding"] == 0.75


def test_time_and_tokens_go_on_from_earlier_starts(clock):
    """All of the time counts, pauses too; padding is no token."""
    shown, config = [], settings(steps=50, logging=LoggingConfig(interval=1))
    clock.now = 500.0
    made = Meter(config, 1000, lambda step, metrics, due: shown.append(metrics), dict, 40.5, 1000)
    for step, padding in ((8, 0.25), (9, 0.0)):
        clock.now += 2.0
        made.push(step, {"loss": jnp.float32(3), "padding": jnp.float32(padding)})
        made.flush()
        with made.paused():
            clock.now += 100.0
    assert [(m["wall_seconds"], m["tokens"]) for m in shown] == [(42.5, 1048), (144.5, 1112)]
    assert (made.seconds, made.tokens) == (244.5, 1112)
    assert made.totals() == {"wall_seconds": 244.5, "tokens": 1112}


def test_where_earlier_starts_did_not_count_there_are_no_totals(clock):
    shown, config = [], settings(steps=50, logging=LoggingConfig(interval=1))
    made = Meter(config, 1000, lambda step, metrics, due: shown.append(metrics), dict, None, None)
    made.push(8, {"loss": jnp.float32(3)})
    made.flush()
    assert made.totals() == {} and not {"wall_seconds", "tokens"} & shown[0].keys()


def test_the_last_step_is_due_whatever_the_interval(clock):
    shown = {}
    config = settings(steps=50, logging=LoggingConfig(interval=3))
    made = Meter(config, 1000, lambda step, metrics, due: shown.update({step: due}), dict)
    for step in (47, 48, 49, 50):
        clock.now += 1.0
        made.push(step, {"loss": jnp.float32(3)})
    clock.now += 1.0
    made.flush()
    assert shown == {47: False, 48: True, 49: False, 50: True}

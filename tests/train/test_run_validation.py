"""What validation decides in a run: which weights it sees, when patience ends it, which checkpoints stay."""

import json
import math

import jax
import pytest
from helpers.runs import cli, log_of, same_weights

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.train import meter, resume, run


@pytest.fixture
def scripted(monkeypatch):
    """Validations give the losses of a list, one after the other, and note the weights that they were given."""

    def script(losses):
        losses, seen = iter(losses), []

        def evaluate(eval_step, params, batches, limit, report, state, stopped):
            seen.append(jax.device_get(params))
            return {"loss": next(losses), "perplexity": 1.0, "accuracy": 0.0}

        monkeypatch.setattr(run, "evaluate", evaluate)
        return seen

    return script


def steps_of(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").glob("[0-9]*"))


EVERY_STEP = ("evaluation.interval=1", "checkpoint.interval=1")


def test_the_average_is_validated(scripted, config_file, tmp_path):
    seen = scripted([5.0] * 9)
    assert cli(config_file, "steps=4", *EVERY_STEP, "ema_decay=0.5") == 0
    assert len(seen) == 4
    averaged = load_weights(tmp_path / "run", 4)[1]
    assert same_weights(seen[-1], averaged)
    assert not same_weights(seen[-1], seen[-2])


def test_the_best_checkpoints_stay_besides_the_newest(scripted, config_file, tmp_path):
    scripted([5.0, 3.0, 4.0, 2.5, 6.0, 7.0])
    assert cli(config_file, "steps=6", *EVERY_STEP, "checkpoint.keep_latest=1", "checkpoint.keep_best=2") == 0
    assert steps_of(tmp_path / "run") == [2, 4, 6]


def test_patience_counts_validations_without_a_better_loss_also_over_a_resume(scripted, config_file, tmp_path, capsys):
    settings = (*EVERY_STEP, "evaluation.patience=2")
    scripted([5.0, 4.0, 4.5])
    assert cli(config_file, "steps=3", *settings) == 0
    assert "stopped early" not in capsys.readouterr().out
    scripted([4.6, 1.0, 1.0])
    assert cli(config_file, "steps=9", *settings) == 0
    assert "stopped early at step 4: 2 validations without a better loss" in capsys.readouterr().out
    assert steps_of(tmp_path / "run")[-1] == 4
    assert list(log_of(tmp_path / "run")[1].values()) == [5.0, 4.0, 4.5, 4.6]


def test_a_run_that_patience_ended_stays_ended_until_it_gets_more(scripted, config_file, tmp_path, capsys):
    settings = (*EVERY_STEP, "steps=9", "checkpoint.keep_latest=2")
    scripted([5.0, 6.0])
    assert cli(config_file, *settings, "evaluation.patience=1") == 0
    left, log = steps_of(tmp_path / "run"), log_of(tmp_path / "run")
    capsys.readouterr()
    for _ in range(2):
        scripted([])
        assert cli(config_file, *settings, "evaluation.patience=1") == 0
        out = capsys.readouterr().out
        assert "stopped early at step 2: 1 validations without a better loss. A larger evaluation.patience" in out
        assert (steps_of(tmp_path / "run"), log_of(tmp_path / "run")) == (left, log)
    scripted([4.0] * 7)
    assert cli(config_file, *settings, "evaluation.patience=3") == 0
    assert "resumed at step 2" in capsys.readouterr().out


def test_patience_that_ends_with_the_last_step_ends_nothing_early(scripted, config_file, capsys):
    scripted([5.0, 6.0, 7.0])
    assert cli(config_file, *EVERY_STEP, "steps=3", "evaluation.patience=2", "schedule.warmup_steps=1") == 0
    assert "stopped early" not in capsys.readouterr().out


def test_a_validation_loss_that_is_no_number_is_no_best_one(scripted, config_file, tmp_path, capsys):
    """It neither blocks better ones nor keeps its checkpoint."""
    scripted([math.nan, 5.0, math.nan, 6.0])
    settings = (*EVERY_STEP, "steps=4", "checkpoint.keep_latest=1", "checkpoint.keep_best=1", "schedule.warmup_steps=1")
    assert cli(config_file, *settings) == 0
    assert steps_of(tmp_path / "run") == [2, 4]
    assert "best validation loss" in capsys.readouterr().out


def test_an_equal_loss_is_no_better_one(scripted, config_file, capsys):
    scripted([4.0, 4.0, 1.0])
    assert cli(config_file, "steps=9", *EVERY_STEP, "evaluation.patience=1") == 0
    assert "stopped early at step 2" in capsys.readouterr().out


def test_speed_leaves_out_the_first_step_validation_and_saving(monkeypatch, config_file, tmp_path):
    """A clock by which a step takes a second, whatever else happens a hundred."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

        def taking(self, seconds, act):
            def slow(*args, **kwargs):
                self.now += seconds
                return act(*args, **kwargs)

            return slow

    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    monkeypatch.setattr(jax, "device_get", clock.taking(1.0, jax.device_get))  # waiting for a step
    losses = {"loss": 3.0, "perplexity": 1.0, "accuracy": 0.0}
    monkeypatch.setattr(run, "evaluate", clock.taking(100.0, lambda *_: losses))
    monkeypatch.setattr(resume, "save", clock.taking(100.0, resume.save))
    monkeypatch.setattr(run, "_first_step", clock.taking(100.0, run._first_step))
    settings = ("logging.interval=3", "evaluation.interval=2", "checkpoint.interval=2", "steps=9")
    assert cli(config_file, *settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens_per_second"] for line in lines if "loss" in line] == [4 * 32] * 3

"""What validation decides in a run: which weights it sees, when patience ends it, which checkpoints stay."""

import json
import math
import os
import shutil
import signal
from typing import ClassVar

import jax
import pytest
from helpers.runs import CONSTANT, ROOT, cli, log_of, one_error, same_weights, write_config

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.config import override
from stellarbyte_jax.data.files import DataError
from stellarbyte_jax.training import messages, meter, resume, run
from stellarbyte_jax.training.samples import Sampler
from stellarbyte_jax.training.validation import check_comparable, measured_on


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path, CONSTANT)


@pytest.fixture
def scripted(monkeypatch):
    """Validations give the losses of a list, one after the other, and note the weights that they were given.

    None: a signal breaks one off.
    """

    def script(losses):
        losses, seen = iter(losses), []

        def evaluate(eval_step, params, batches, limit, report, state, stopped):
            seen.append(jax.device_get(params))
            loss = next(losses)
            if loss is None:
                os.kill(os.getpid(), signal.SIGTERM)
                return None
            return {"loss": loss, "perplexity": 1.0, "accuracy": 0.0}

        monkeypatch.setattr(run, "evaluate", evaluate)
        return seen

    return script


def steps_of(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").glob("[0-9]*"))


NO_VALIDATION = ("data.validation=[]", "evaluation.interval=500", "evaluation.batches=50")
EVERY_STEP = ("evaluation.interval=1", "checkpoint.interval=1")


def test_the_average_is_validated(scripted, config_file, tmp_path):
    seen = scripted([5.0] * 9)
    assert cli(config_file, "steps=4", *EVERY_STEP) == 0
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
    assert cli(config_file, *EVERY_STEP, "steps=3", "evaluation.patience=2") == 0
    assert "stopped early" not in capsys.readouterr().out


def test_the_last_step_ends_nothing_early_where_its_validation_was_broken_off(scripted, config_file, capsys):
    settings = (*EVERY_STEP, "steps=2", "evaluation.patience=1")
    scripted([5.0, None])
    assert cli(config_file, *settings) == 143
    scripted([6.0])
    assert cli(config_file, *settings) == 0
    out = capsys.readouterr().out
    assert "stopped early" not in out and "summary" in out


def test_a_validation_that_was_broken_off_is_no_longer_due_after_steps_without_any(scripted, config_file, tmp_path):
    scripted([None])
    assert cli(config_file, "steps=5", "evaluation.interval=2") == 143
    assert cli(config_file, "steps=3", *NO_VALIDATION) == 0
    scripted([4.0])
    assert cli(config_file, "steps=5") == 0
    assert log_of(tmp_path / "run")[1] == {5: 4.0}


def test_a_run_beyond_its_steps_does_what_is_missing_and_no_more(scripted, config_file, tmp_path, capsys):
    export = "export_at_end=true"
    scripted([None])
    assert cli(config_file, export, "steps=5", "evaluation.interval=3") == 143
    run, done = tmp_path / "run", {"step": 3, "exported": True}
    scripted([4.0])
    assert cli(config_file, export, "steps=2") == 0
    out = capsys.readouterr().out
    assert "step 3/3  validation" in out and "3/2" not in out and "  steps: 3\n" in out
    assert json.loads((run / "finished.json").read_text()) == done and steps_of(run) == [3]
    exported = (run / "hf").stat().st_mtime_ns
    for fewer in ("steps=2", "steps=1", "steps=3"):
        assert cli(config_file, export, fewer) == 0
        said = "3 of 3 steps" if fewer == "steps=3" else f"it stands at step 3, beyond {fewer}"
        assert f"is complete: {said}" in capsys.readouterr().out
    assert json.loads((run / "finished.json").read_text()) == done
    assert (run / "hf").stat().st_mtime_ns == exported and log_of(run)[1] == {3: 4.0}


def test_a_signal_breaks_off_the_validation_at_the_end_of_the_data(scripted, config_file, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"text": "a few words"}\n' * 30)
    few = (f"data.train={tmp_path / 'few.jsonl'}", "data.epochs=1", "steps=9")
    scripted([None])
    assert cli(config_file, *few) == 143
    (step,) = steps_of(tmp_path / "run")
    assert f"stopped at step {step} of 9" in capsys.readouterr().out
    for losses in ([4.0], []):
        scripted(losses)
        assert cli(config_file, *few) == 0
        assert f"the data ended after 1 epochs, at step {step} of 9" in capsys.readouterr().out
        assert log_of(tmp_path / "run")[1] == {step: 4.0}


def test_a_checkpoint_is_written_where_the_loss_is_better(scripted, config_file, tmp_path):
    """Between those that are due, and at the end; not where it is only not the worst."""
    scripted([5.0, 6.0, 4.0, 7.0, 8.0])
    kept = ("checkpoint.interval=100", "checkpoint.keep_latest=9", "checkpoint.keep_best=2")
    assert cli(config_file, "steps=5", "evaluation.interval=1", *kept) == 0
    assert steps_of(tmp_path / "run") == [1, 3, 5]


def test_a_complete_run_puts_back_what_a_killed_export_had_moved(config_file, tmp_path, capsys):
    settings = (*NO_VALIDATION, "steps=2")
    assert cli(config_file, *settings, "export_at_end=true") == 0
    directory = tmp_path / "run"
    (directory / "hf").rename(directory / ".hf.old-1")
    capsys.readouterr()
    assert cli(config_file, *settings) == 0
    out = capsys.readouterr().out
    assert "is complete: 2 of 2 steps" in out and "resumed" not in out and "summary" not in out
    assert [path.name for path in directory.glob("*hf*")] == ["hf"]
    config = override(load_weights(directory)[0], ["steps=1"])
    assert run.train(config) == run.Finished(0, 2, "steps")


def test_a_constant_schedule_has_no_end_that_the_data_could_miss(config_file, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"text": "a few words"}\n' * 30)
    few = (f"data.train={tmp_path / 'few.jsonl'}", "data.epochs=1", "steps=9")
    assert cli(config_file, *few, *NO_VALIDATION) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "the data ended" in line)
    assert line.endswith("of 9")


def test_the_last_step_is_validated_of_a_run_that_was_to_be_longer(scripted, config_file, tmp_path, capsys):
    assert cli(config_file, "steps=1", *NO_VALIDATION) == 0
    scripted([4.0])
    for _ in range(2):
        assert cli(config_file, "steps=1") == 0
        assert log_of(tmp_path / "run")[1] == {1: 4.0}


def test_validation_on_other_rows_is_refused_when_a_run_goes_on(scripted, config_file, tmp_path, capsys):
    rows = tmp_path / "valid.jsonl"
    shutil.copy(ROOT / "data" / "tiny_bilingual_valid.jsonl", rows)
    setting = f"data.validation={rows}"
    scripted([5.0])
    assert cli(config_file, setting, "steps=1") == 0
    capsys.readouterr()
    assert cli(config_file, setting, "steps=2", "evaluation.batches=3") == 1
    assert one_error(capsys, "data.validation: evaluation.batches was 2 and is 3", "set evaluation.batches=2, or start")
    before = rows.read_text()
    rows.write_text(before + '{"text": "more"}\n')
    assert cli(config_file, setting, "steps=2") == 1
    assert one_error(capsys, f"data.validation: {rows}: other content than before", "put them back as they were")
    other = f"data.validation={ROOT / 'data' / 'tiny_bilingual_train.jsonl'}"
    assert cli(config_file, "steps=2", other) == 1
    assert one_error(capsys, "data.validation: the files were valid.jsonl and are now tiny_bilingual_train.jsonl")
    assert cli(config_file, "steps=2", *NO_VALIDATION) == 0
    capsys.readouterr()
    assert cli(config_file, setting, "steps=3") == 1  # the best is still that of the first rows
    assert one_error(capsys, f"{rows}: other content than before")
    rows.write_text(before)
    scripted([4.0])
    assert cli(config_file, setting, "steps=3") == 0


class Rows:
    """A loader of two files, of which all batches were read or not."""

    contents: ClassVar = [["a", "1"], ["b", "2"]]

    def __init__(self, pass_batches=None):
        self.pass_batches = pass_batches

    def changed(self, before):
        return None if before == self.contents else "other files"


def test_losses_are_compared_where_the_same_rows_were_read():
    part, whole = measured_on(Rows(), 3), measured_on(Rows(4), 9)
    for before, same, other in ((part, [3], [2, 4, None]), (whole, [4, 5, None], [1, 3]), (None, [1, None], [])):
        for limit in same:
            check_comparable(before, Rows(), limit)
        for limit in other:
            with pytest.raises(DataError, match=rf"evaluation\.batches (was 3 and )?is {limit}[.,]"):
                check_comparable(before, Rows(), limit)
    with pytest.raises(DataError, match=r"data\.validation: other files\. Losses could not be compared"):
        check_comparable({**part, "files": []}, Rows(), 3)


def test_a_validation_loss_that_is_no_number_is_no_best_one(scripted, config_file, tmp_path, capsys):
    """It neither blocks better ones nor keeps its checkpoint."""
    scripted([math.nan, 5.0, math.nan, 6.0])
    settings = (*EVERY_STEP, "steps=4", "checkpoint.keep_latest=1", "checkpoint.keep_best=1")
    assert cli(config_file, *settings) == 0
    assert steps_of(tmp_path / "run") == [2, 4]
    assert "best validation loss" in capsys.readouterr().out


def test_an_equal_loss_is_no_better_one(scripted, config_file, capsys):
    scripted([4.0, 4.0, 1.0])
    assert cli(config_file, "steps=9", *EVERY_STEP, "evaluation.patience=1") == 0
    assert "stopped early at step 2" in capsys.readouterr().out


def test_speed_leaves_out_the_first_step_validation_saving_and_samples_and_time_does_not(
    monkeypatch, config_file, tmp_path
):
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
    monkeypatch.setattr(messages, "first_step", clock.taking(100.0, messages.first_step))
    monkeypatch.setattr(Sampler, "sample", clock.taking(100.0, lambda *_: None))
    settings = ("logging.interval=3", "evaluation.interval=2", "checkpoint.interval=2", "steps=9")
    settings += ("sample_interval=4", "sample_prompts=a")
    assert cli(config_file, *settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens_per_second"] for line in lines if "loss" in line] == [4 * 32] * 3
    assert [line["wall_seconds"] // 100 for line in lines if "loss" in line] == [3, 6, 11]

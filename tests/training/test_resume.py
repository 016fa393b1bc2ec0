"""Is resuming exact, does a kill at any time lose nothing, which checkpoints are refused?"""

import contextlib
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import child, cli, copy_of, log_of, one_error, same_weights
from helpers.training import settings

from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.config import DataConfig, EvaluationConfig
from stellarbyte_jax.hf.directory import from_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import resume
from stellarbyte_jax.training.meter import DivergedError
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.state import create_state, state_shapes

DIES_WHILE_SAVING = """
from orbax.checkpoint._src.path import atomicity
finalize = atomicity.AtomicRenameTemporaryPath.finalize
async def dies(self, *args, **kwargs):
    if "/{step}." in str(self.get()):
        os.kill(os.getpid(), signal.SIGKILL)
    return await finalize(self, *args, **kwargs)
atomicity.AtomicRenameTemporaryPath.finalize = dies
"""
# What stops the process, its status, and the step from which the next one goes on if no signal is answered.
INTERRUPTIONS = {
    "kill -9 two steps after a checkpoint": (
        "at_step(9, lambda: (saved(7), os.kill(os.getpid(), signal.SIGKILL)))",
        -9,
        7,
    ),
    "SIGTERM": ("at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM))", 143, None),
    "kill -9 in the middle of a save": (DIES_WHILE_SAVING.format(step=14), -9, None),
    "SIGINT": ("at_step(17, lambda: os.kill(os.getpid(), signal.SIGINT))", 130, None),
}


def test_names_of_checkpoints_tell_whether_a_run_may_be_over(tmp_path):
    def may_be_over(steps, patience=None):
        data, evaluation = DataConfig(sequence_length=16, validation=("x",)), EvaluationConfig(patience=patience)
        config = settings(output_dir=str(tmp_path), steps=steps, data=data, evaluation=evaluation)
        return resume.may_be_over(config)

    assert not may_be_over(20, 3)
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    assert may_be_over(20) and may_be_over(19) and may_be_over(99, 3) and not may_be_over(21)


def totals_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["wall_seconds"] for line in lines], [line["tokens"] for line in lines]


def test_a_run_that_an_older_version_began_goes_on_without_totals(config_file, tmp_path, monkeypatch):
    """Its checkpoints do not say how long it took: a count from there would be wrong."""

    def without_totals(progress):
        return {name: x for name, x in dataclasses.asdict(progress).items() if name not in ("seconds", "tokens")}

    with monkeypatch.context() as patch:
        patch.setattr(resume, "asdict", without_totals)
        assert cli(config_file, "steps=4") == 0
    assert cli(config_file, "steps=6") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: ("wall_seconds" in line, "tokens" in line) for line in lines}
    assert told == {step: (step <= 4, step <= 4) for step in range(1, 7)}


def test_resume_is_exact(config_file, straight, tmp_path, capsys):
    """A run that is stopped in one way after the other ends as one that is never stopped."""
    run, step = tmp_path / "run", 0
    for how, (before, code, resumed_at) in INTERRUPTIONS.items():
        stopped = child(config_file, before)
        assert stopped.returncode == code, stopped.stderr
        assert "Traceback" not in stopped.stderr + stopped.stdout
        assert (f"resumed at step {step} " in stopped.stdout) == (step > 0), how
        if how.startswith("SIG"):
            assert stopped.stdout.count(f"{how}: saving a checkpoint") == 1
            step = int(re.search(r"stopped at step ([0-9]+) of 20", stopped.stdout)[1])
            assert "the same command goes on from there" in stopped.stdout
        assert any("tmp" in p.name for p in (run / "checkpoints").iterdir()) == ("middle" in how)
        step = resumed_at or step
    assert cli(config_file) == 0
    assert f"resumed at step {step} " in capsys.readouterr().out
    assert log_of(run) == log_of(straight)
    (seconds, tokens), (_, expected) = totals_of(run), totals_of(straight)
    assert seconds == sorted(seconds) and seconds[0] > 0, "time never goes backwards"
    assert tokens == expected and len(tokens) == len(seconds) == 22
    (config, params), (_, expected) = load_weights(run), load_weights(straight)
    assert config.steps == 20 and same_weights(params, expected)
    assert not any("tmp" in p.name for p in (run / "checkpoints").iterdir())


IN_VALIDATION = """
from stellarbyte_jax.training import run
evaluate, calls = run.evaluate, []
def interrupted(eval_step, params, batches, limit, report, state, stopped):
    def step(*values):
        calls.append(None)
        if len(calls) == {batch}:
            os.kill(os.getpid(), signal.SIGTERM)
        return eval_step(*values)
    found = evaluate(step, params, batches, limit, report, state, stopped)
    print("batches:", len(calls))
    return found
run.evaluate = interrupted
"""


@pytest.mark.parametrize(("batch", "step", "times"), [(1, 10, 2), (3, 20, 1)])
def test_a_signal_ends_a_validation_which_is_done_when_the_run_goes_on(
    batch, step, times, config_file, straight, tmp_path, capsys
):
    run = tmp_path / "run"
    for _ in range(times):  # also where it comes again while the validation is made up for
        stopped = child(config_file, IN_VALIDATION.format(batch=batch))
        assert stopped.returncode == 143, stopped.stderr
        assert f"batches: {batch}\n" in stopped.stdout
        assert f"step {step}/20  validation broken off" in stopped.stdout
        assert f"SIGTERM: stopped at step {step} of 20" in stopped.stdout
        assert step not in log_of(run)[1]
        batch = 1
    stored = {p: p.stat().st_mtime_ns for p in (run / "checkpoints" / str(step)).iterdir()}
    assert stored
    assert cli(config_file) == 0
    assert f"resumed at step {step} " in capsys.readouterr().out
    assert log_of(run) == log_of(straight)
    assert same_weights(load_weights(run)[1], load_weights(straight)[1])
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(
        p.name for p in (straight / "checkpoints").iterdir()
    )
    assert not (run / "replaced").exists()
    assert cli(config_file) == 0 and "is complete" in capsys.readouterr().out


def test_a_validation_that_was_broken_off_counts_for_the_best_and_for_patience(config_file, tmp_path, capsys):
    settings = ("steps=14", "checkpoint.keep_latest=1", "checkpoint.interval=4", "evaluation.interval=3")
    assert child(config_file, IN_VALIDATION.format(batch=1), *settings).returncode == 143
    worse = ("optimizer.learning_rate=1", "evaluation.patience=3")
    assert cli(config_file, *settings, *worse) == 0
    assert "stopped early at step 12: 3 validations without a better loss" in capsys.readouterr().out
    losses = log_of(tmp_path / "run")[1]
    assert list(losses) == [3, 6, 9, 12] and min(losses, key=lambda step: losses[step]) == 3
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "3"]


def test_a_checkpoint_whose_replacement_was_killed_comes_back(config_file, straight, tmp_path, capsys):
    run = tmp_path / "run"
    assert child(config_file, IN_VALIDATION.format(batch=1)).returncode == 143
    assert child(config_file, DIES_WHILE_SAVING.format(step=10)).returncode == -9
    assert (run / "replaced" / "10").exists() and not (run / "checkpoints" / "10").exists()
    assert cli(config_file) == 0
    assert "resumed at step 10 " in capsys.readouterr().out
    assert log_of(run) == log_of(straight)
    assert not (run / "replaced").exists()


def test_a_second_signal_leaves_at_once(config_file, tmp_path):
    twice = "at_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])"
    done = child(config_file, twice)
    assert done.returncode == 130
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert "Traceback" not in done.stderr


def test_a_corrupt_checkpoint_is_set_aside(straight, config_file, tmp_path, capsys):
    run = copy_of(straight, tmp_path)
    for file in (run / "checkpoints" / "20" / "optimizer").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    assert cli(config_file) == 0
    out = capsys.readouterr().out
    assert "checkpoint 20 is unreadable" in out and "resumed at step 14" in out
    assert (run / "corrupt" / "20").is_dir()
    assert log_of(run) == log_of(straight)


def test_an_emptied_checkpoint_is_set_aside(straight, config_file, tmp_path, capsys):
    run = copy_of(straight, tmp_path)
    for item in (run / "checkpoints" / "20").iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    assert cli(config_file) == 0
    out = capsys.readouterr().out
    assert "nearly all of it is missing" in out and "resumed at step 14" in out
    assert log_of(run) == log_of(straight)


def test_the_end_of_a_run_is_done_later_where_a_signal_kept_it_from_being_done(config_file, tmp_path, capsys):
    """In its last step; and it is done for a complete run that was not asked for it before."""
    end, run = ("export_at_end=true", "sample_prompts=a"), tmp_path / "run"
    stopped = child(config_file, "at_step(20, lambda: os.kill(os.getpid(), signal.SIGTERM))", *end)
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped at step 20 of 20; the same command does what is left to do after it" in stopped.stdout
    assert not (run / "hf").exists()
    (run / ".hf.partial-1").mkdir()  # of an export that was killed, whose number another process has now
    assert cli(config_file) == 0  # the last validation is left too
    assert not list(run.glob(".hf*"))
    assert not (run / "hf").exists() and "step 20/20  validation" in capsys.readouterr().out
    assert cli(config_file) == 0
    assert not (run / "hf").exists() and "is complete" in capsys.readouterr().out
    assert cli(config_file, *end) == 0
    assert "sample: a|" in capsys.readouterr().out
    assert (run / "hf" / "config.json").is_file() and not list(run.glob(".hf*"))
    assert cli(config_file, *end) == 0
    assert "sample: a|" not in capsys.readouterr().out


def test_what_was_made_of_weights_that_are_trained_again_is_made_again(config_file, tmp_path, capsys):
    """Also at a step of the same number, as where the newest checkpoint was damaged."""
    run, end = tmp_path / "run", ("steps=4", "export_at_end=true", "sample_prompts=a", "evaluation.interval=2")
    assert cli(config_file, *end, "checkpoint.interval=2") == 0
    shutil.rmtree(run / "checkpoints" / "4" / "params")
    capsys.readouterr()
    assert cli(config_file, *end, "optimizer.learning_rate=0.1") == 0
    out = capsys.readouterr().out
    assert "resumed at step 2" in out and "sample: a|" in out
    exported = from_pretrained(run / "hf")[1]["embed"]["embedding"]
    np.testing.assert_array_equal(exported, load_weights(run)[1]["embed"]["embedding"])


def test_a_checkpoint_that_holds_nan_is_set_aside(tmp_path, monkeypatch):
    config = settings()
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    good = create_state(config, model, optimizer)
    said = []
    with contextlib.closing(Checkpointer(tmp_path, config.checkpoint)) as checkpointer:

        def save(step, state):
            state = state.replace(step=jnp.asarray(step, jnp.int32))
            resume.save(checkpointer, config, state, step, {}, resume.Progress())
            checkpointer.wait()

        save(1, good)
        for state in (poisoned(good), good.replace(params=jax.tree.map(lambda x: x / 0, good.params))):
            with pytest.raises(DivergedError, match=r"^(optimizer|params) of .* that are not finite at step 2\. "):
                save(2, state)
        assert checkpointer.steps == [1]
        with monkeypatch.context() as bent:
            bent.setattr(resume, "_poisoned", lambda items: [])
            save(2, poisoned(good))
        shapes = state_shapes(config, model, optimizer)
        found = resume.restore(checkpointer, config, shapes, optimizer, said.append)
    assert int(found.state.step) == 1 and same_weights(found.state.params, good.params)
    assert len(said) == 1 and "checkpoint 2 is unreadable" in said[0]
    assert "optimizer of it hold numbers that are not finite" in said[0]


def poisoned(state):
    """One number of the optimizer's state is none."""
    leaves, tree = jax.tree.flatten(state.opt_state)
    at = next(i for i, leaf in enumerate(leaves) if leaf.ndim > 1)
    leaves[at] = leaves[at].at[(0,) * leaves[at].ndim].set(jnp.nan)
    return state.replace(opt_state=jax.tree.unflatten(tree, leaves))


def test_all_checkpoints_corrupt(straight, config_file, tmp_path, capsys):
    run = copy_of(straight, tmp_path)
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file() and "params" in str(file):
            file.write_bytes(b"")
    assert cli(config_file) == 1
    assert one_error(capsys, "no checkpoint in", "could be read")
    with pytest.raises(Exception, match="holds no checkpoint"):
        load_weights(run)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("model.hidden_size=32", ["another model", "model.hidden_size is 16 there and 32 here"]),
        ("data.sequence_length=16", ["cannot be continued", "data.sequence_length was 32 and is 16"]),
        ("seed=4", ["seed was 0 and is 4"]),
        ("optimizer.name=lion", ["optimizer.name was 'adamw' and is 'lion'"]),
        ("ema_decay=none", ["ema_decay was 0.9 and is None"]),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(setting, parts, straight, config_file, tmp_path, capsys):
    copy_of(straight, tmp_path)
    assert cli(config_file, setting, "steps=30") == 1
    assert one_error(capsys, *parts)


def test_a_longer_run_goes_on(straight, config_file, tmp_path, capsys):
    run = copy_of(straight, tmp_path)
    assert cli(config_file, "steps=22") == 0
    assert "resumed at step 20" in capsys.readouterr().out
    assert set(log_of(run)[0]) == set(range(1, 23))


def test_a_disk_too_small_for_a_checkpoint(straight, config_file, tmp_path, capsys, monkeypatch):
    run = copy_of(straight, tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli(config_file, "steps=22") == 1
    assert one_error(
        capsys,
        "a checkpoint could not be written",
        "it takes 0.4 MiB, and 0.1 MiB are free",
        "Step 20 is the last complete one",
    )
    monkeypatch.undo()
    assert same_weights(load_weights(run)[1], load_weights(straight)[1])


def test_a_disk_that_fills_up_while_saving(config_file, tmp_path):
    """The limit on the size of a file stands in for the disk; the earlier checkpoint stays usable."""
    assert cli(config_file, "steps=7", "evaluation.interval=100") == 0
    before = load_weights(tmp_path / "run")[1]
    full = child(
        config_file,
        "import resource; at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))",
        "evaluation.interval=100",
    )
    assert full.returncode == 1
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a checkpoint could not be written" in errors[0], full.stderr
    assert "Step 7 is the last complete one" in errors[0], errors[0]
    assert "_SignalingThread" not in full.stderr, full.stderr
    assert same_weights(before, load_weights(tmp_path / "run")[1])


def test_nothing_is_said_or_made_before_the_last_checkpoint_is_on_disk(config_file, tmp_path, capsys, monkeypatch):
    def wait(self):
        raise CheckpointError("it could not be written")

    monkeypatch.setattr(Checkpointer, "wait", wait)
    assert cli(config_file, "steps=4", "export_at_end=True") == 1
    out, err = capsys.readouterr()
    assert "step 4/4  loss" in out and "summary" not in out
    assert err.startswith("error: it could not be written") and len(err.splitlines()) == 1
    assert not (tmp_path / "run" / "hf").exists()


def test_a_directory_that_is_moved_is_told_before_anything_is_made_in_its_place(config_file, tmp_path):
    """The export of the end would make it anew, and the run would end as if all were well."""
    run, moved = str(tmp_path / "run"), str(tmp_path / "moved")
    ended = child(config_file, f"at_step(2, lambda: os.rename({run!r}, {moved!r}))", "steps=4", "export_at_end=True")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {run} is no longer there: the directory was moved or removed"), ended.stderr
    assert not (tmp_path / "run").exists()


def test_training_starts_from_converted_weights(straight, config_file, tmp_path, capsys):
    """A converted checkpoint spells out sizes that a config file may leave to be derived."""
    config, params = load_weights(straight)
    spelt = dataclasses.replace(config.model, num_key_value_heads=2, head_dim=8)
    save_initial(tmp_path / "run", spelt, params)
    assert cli(config_file, "steps=3", "optimizer.learning_rate=1e-9") == 0
    assert "starting from the weights in" in capsys.readouterr().out
    first = {run: log_of(run)[0][1][0] for run in (straight, tmp_path / "run")}
    assert first[tmp_path / "run"] < first[straight] - 0.2


def test_a_validation_loss_is_of_its_step():
    progress = resume.Progress()
    assert progress.loss_at(0) is None
    progress.measured(5, 3.0, {})
    progress.measured(7, 3.5, {})  # no better one, but that of these weights
    assert (progress.best_loss, progress.loss_at(5), progress.loss_at(7), progress.loss_at(8)) == (3.0, None, 3.5, None)
    progress.measured(9, float("nan"), {})
    assert progress.loss_at(9) is None

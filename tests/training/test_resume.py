"""Is resuming exact, does a kill at any time lose nothing, which checkpoints are refused?"""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import until
from helpers.runs import at_step, cli, copy_of, log_of, one_error, same_weights
from helpers.training import first_state, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import atomicity

from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.config import DataConfig, EvaluationConfig
from stellarbyte_jax.hf.directory import from_pretrained
from stellarbyte_jax.launch import signals
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import resume
from stellarbyte_jax.training import run as run_module
from stellarbyte_jax.training.meter import DivergedError
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.state import state_shapes


@contextlib.contextmanager
def killed_while_saving(run, step):
    """Within it, a run saves a checkpoint of this step; what a kill at its end would have left is what is left."""
    finalize, left = atomicity.AtomicRenameTemporaryPath.finalize, run.with_name("left")

    async def dies(self, *args, **kwargs):
        if f"/{step}." in str(self.get()) and not left.exists():
            with contextlib.suppress(shutil.Error):  # of files that other threads move
                shutil.copytree(run, left)
        return await finalize(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", dies)
        yield
    shutil.rmtree(run)
    left.rename(run)


def term():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


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

    with monkeypatch.context() as patch, at_step(4, term):
        patch.setattr(resume, "asdict", without_totals)
        assert cli(config_file) == 143
    (step,) = map(int, os.listdir(tmp_path / "run" / "checkpoints"))
    assert step < 20 and cli(config_file) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: ("wall_seconds" in line, "tokens" in line) for line in lines}
    assert told == {each: (each <= step, each <= step) for each in range(1, 21)}


@contextlib.contextmanager
def a_signal_in_validation(batch):
    """Within it, SIGTERM comes before the n-th batch of all that are validated; gives the batches that were begun."""
    evaluate, begun = run_module.evaluate, []

    def interrupted(eval_step, *args):
        def step(*values):
            begun.append(None)
            if len(begun) == batch:
                term()
            return eval_step(*values)

        return evaluate(step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "evaluate", interrupted)
        yield begun


def test_resume_is_exact(config_file, straight, tmp_path, capfd):
    """A run that is stopped in one way after the other ends as one that is never stopped."""
    run, step = tmp_path / "run", 0
    for how in (
        a_signal_in_validation(1),  # of step 10, whose checkpoint is written again when that is made up for
        killed_while_saving(run, 10),
        at_step(12, interrupt),
        killed_while_saving(run, 14),
    ):
        with how:
            code = cli(config_file)
        out, err = capfd.readouterr()
        assert "Traceback" not in err + out
        assert (f"resumed at step {step} " in out) == (step > 0), how
        if code != 0:
            name = {143: "SIGTERM", 130: "SIGINT"}[code]
            assert out.count(f"{name}: saving a checkpoint") == 1
            step = int(re.search(r"stopped at step ([0-9]+) of 20", out)[1])
            assert step == 10 if code == 143 else 12 <= step < 14
            assert "the same command goes on from there" in out
        elif step == 10:
            assert (run / "checkpoints" / "replaced" / "10").exists() and not (run / "checkpoints" / "10").exists()
        assert any("tmp" in p.name for p in (run / "checkpoints").iterdir()) == (code == 0)
    assert max(log_of(run)[0]) >= 14, "steps that are lost"
    assert cli(config_file) == 0
    assert f"resumed at step {step} " in capfd.readouterr().out
    assert log_of(run) == log_of(straight)
    (seconds, tokens), (_, expected) = totals_of(run), totals_of(straight)
    assert seconds == sorted(seconds) and seconds[0] > 0, "time never goes backwards"
    assert tokens == expected and len(tokens) == len(seconds) == 22
    (config, params), (_, expected) = load_weights(run), load_weights(straight)
    assert config.steps == 20 and same_weights(params, expected)
    assert not any("tmp" in p.name for p in (run / "checkpoints").iterdir())
    assert not (run / "checkpoints" / "replaced").exists()


@pytest.mark.parametrize(("batch", "step", "times"), [(1, 10, 2), (3, 20, 1)])
def test_a_signal_ends_a_validation_which_is_done_when_the_run_goes_on(
    batch, step, times, config_file, straight, tmp_path, capsys
):
    run = tmp_path / "run"
    for _ in range(times):  # also where it comes again while the validation is made up for
        with a_signal_in_validation(batch) as begun:
            assert cli(config_file) == 143
        out = capsys.readouterr().out
        assert len(begun) == batch
        assert f"step {step}/20  validation broken off" in out
        assert f"SIGTERM: stopped at step {step} of 20" in out
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
    assert not (run / "checkpoints" / "replaced").exists()
    assert cli(config_file) == 0 and "is complete" in capsys.readouterr().out


def test_a_validation_that_was_broken_off_counts_for_the_best_and_for_patience(config_file, tmp_path, capsys):
    settings = ("checkpoint.keep_latest=1", "checkpoint.interval=4", "evaluation.interval=3")
    with a_signal_in_validation(1):
        assert cli(config_file, *settings) == 143
    worse = ("optimizer.learning_rate=1", "evaluation.patience=3")
    assert cli(config_file, *settings, *worse) == 0
    assert "stopped early at step 12: 3 validations without a better loss" in capsys.readouterr().out
    losses = log_of(tmp_path / "run")[1]
    assert list(losses) == [3, 6, 9, 12] and min(losses, key=lambda step: losses[step]) == 3
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "3"]


def test_a_second_signal_leaves_at_once(config_file, tmp_path, monkeypatch):
    left = []

    def leave(status):  # the process, which goes on here
        left.append((status, list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))))

    def twice():
        interrupt()
        interrupt()
        until(lambda: left, 60)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(signals, "_SAME_SECONDS", 0)
    with at_step(3, twice):
        cli(config_file)
    assert left == [(130, [])]


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
    with at_step(20, term):
        assert cli(config_file, *end) == 143
    out = capsys.readouterr().out
    assert "stopped at step 20 of 20; the same command does what is left to do after it" in out
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


def test_what_was_made_of_weights_that_are_trained_again_is_made_again(straight, config_file, tmp_path, capsys):
    """Also at a step of the same number, as where the newest checkpoint was damaged."""
    run, end = copy_of(straight, tmp_path), ("export_at_end=true", "sample_prompts=a")
    assert cli(config_file, *end) == 0
    before = from_pretrained(run / "hf")[1]["embed"]["embedding"]
    shutil.rmtree(run / "checkpoints" / "20" / "params")
    capsys.readouterr()
    assert cli(config_file, *end, "optimizer.learning_rate=1") == 0
    out = capsys.readouterr().out
    assert "resumed at step 14" in out and "sample: a|" in out
    exported = from_pretrained(run / "hf")[1]["embed"]["embedding"]
    assert not np.array_equal(exported, before)
    np.testing.assert_array_equal(exported, load_weights(run)[1]["embed"]["embedding"])


def test_a_checkpoint_that_holds_nan_is_set_aside(tmp_path, monkeypatch):
    config = settings()
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    good = first_state(config)
    said = []
    with contextlib.closing(Checkpointer(tmp_path, config.checkpoint)) as checkpointer:

        def save(step, state):
            state = state.replace(step=jax.device_put(np.asarray(step, np.int32)))
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


def test_a_state_that_lay_on_several_devices_goes_on_on_one(tmp_path):
    config = settings()
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    several = NamedSharding(Mesh(jax.devices(), "data"), PartitionSpec())
    with contextlib.closing(Checkpointer(tmp_path, config.checkpoint)) as checkpointer:
        state = jax.device_put(first_state(config).replace(step=jnp.asarray(1, jnp.int32)), several)
        resume.save(checkpointer, config, state, 1, {}, resume.Progress())
        checkpointer.wait()
        found = resume.restore(checkpointer, config, state_shapes(config, model, optimizer), optimizer, print)
    assert {device for leaf in jax.tree.leaves(found.state) for device in leaf.devices()} == {jax.devices()[0]}
    assert same_weights(found.state.params, state.params)


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


def test_a_disk_too_small_for_a_checkpoint(straight, config_file, tmp_path, capsys, monkeypatch):
    run = copy_of(straight, tmp_path)
    shutil.rmtree(run / "checkpoints" / "20")
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli(config_file) == 1
    assert one_error(
        capsys,
        "a checkpoint could not be written",
        "it takes 0.4 MiB, and 0.1 MiB are free",
        "Step 14 is the last complete one",
    )
    monkeypatch.undo()
    assert same_weights(load_weights(run)[1], load_weights(straight, 14)[1])


def test_a_disk_that_fills_up_while_saving(config_file, tmp_path, capfd):
    """The limit on the size of a file stands in for the disk; the earlier checkpoint stays usable."""
    run, before, limits = tmp_path / "run", [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        until((run / "checkpoints" / "7").exists)
        before.append(load_weights(run)[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with at_step(8, fill):
            code = cli(config_file, "evaluation.interval=100")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capfd.readouterr().err
    assert code == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a checkpoint could not be written" in errors[0], said
    assert "Step 7 is the last complete one" in errors[0], errors[0]
    assert "_SignalingThread" not in said, said
    assert same_weights(before[0], load_weights(run)[1])


def test_nothing_is_said_or_made_before_the_last_checkpoint_is_on_disk(
    straight, config_file, tmp_path, capsys, monkeypatch
):
    def wait(self):
        raise CheckpointError("it could not be written")

    shutil.rmtree(copy_of(straight, tmp_path) / "checkpoints" / "20")
    monkeypatch.setattr(Checkpointer, "wait", wait)
    assert cli(config_file, "export_at_end=True") == 1
    out, err = capsys.readouterr()
    assert "step 20/20  loss" in out and "summary" not in out
    assert err.startswith("error: it could not be written") and len(err.splitlines()) == 1
    assert not (tmp_path / "run" / "hf").exists()


def test_a_directory_that_is_moved_is_told_before_anything_is_made_in_its_place(config_file, tmp_path, capsys):
    """The export of the end would make it anew, and the run would end as if all were well."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    late = ("checkpoint.interval=100", "evaluation.interval=100", "export_at_end=True")
    with at_step(2, lambda: run.rename(moved)):
        assert cli(config_file, *late) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run} is no longer there: the directory was moved or removed"), err
    assert not run.exists()


def test_training_starts_from_converted_weights(straight, config_file, tmp_path, capsys):
    """A converted checkpoint spells out sizes that a config file may leave to be derived."""
    config, params = load_weights(straight)
    spelt = dataclasses.replace(config.model, num_key_value_heads=2, head_dim=8)
    save_initial(tmp_path / "run", spelt, params)
    assert cli(config_file, "checkpoint.interval=100", "evaluation.interval=100") == 0
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


def test_the_best_loss_is_a_number_less_than_those_before():
    progress, found = resume.Progress(), []
    for step, loss in enumerate((float("nan"), float("inf"), 3.0, 3.0, float("nan"), 2.0)):
        progress.measured(step, loss, {})
        found.append((progress.best_loss, progress.stale))
    assert found == [(None, 1), (None, 2), (3.0, 0), (3.0, 1), (3.0, 2), (2.0, 0)]
    assert progress.exhausted(0) and not progress.exhausted(1) and not progress.exhausted(None)

"""Is resuming exact, does a kill at any time lose nothing, which checkpoints are refused?"""

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest
from helpers.runs import child, cli, copy_of, log_of, one_error, same_weights
from helpers.training import settings

from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.train import resume
from stellarbyte_jax.train.optimizer import make_optimizer
from stellarbyte_jax.train.state import create_state, state_shapes

INTERRUPTIONS = {
    # seven steps, a checkpoint, two steps more that are lost
    "kill -9 between checkpoints": ("at_step(9, lambda: (saved(7), os.kill(os.getpid(), signal.SIGKILL)))", -9, 7),
    "SIGTERM": ("at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))", 143, None),
    "SIGINT": ("at_step(9, lambda: os.kill(os.getpid(), signal.SIGINT))", 130, None),
    "kill -9 in the middle of a save": (
        """
from orbax.checkpoint._src.path import atomicity
finalize = atomicity.AtomicRenameTemporaryPath.finalize
async def dies(self, *args, **kwargs):
    if "/14." in str(self.get()):
        os.kill(os.getpid(), signal.SIGKILL)
    return await finalize(self, *args, **kwargs)
atomicity.AtomicRenameTemporaryPath.finalize = dies
""",
        -9,
        10,  # the validation of step 10 was the best so far
    ),
}


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_resume_is_exact(how, config_file, straight, tmp_path, capsys):
    before, code, resumed_at = INTERRUPTIONS[how]
    stopped = child(config_file, before)
    assert stopped.returncode == code, stopped.stderr
    assert "Traceback" not in stopped.stderr + stopped.stdout
    run = tmp_path / "run"
    if how.startswith("SIG"):
        assert stopped.stdout.count(f"{how}: saving a checkpoint") == 1
        assert "the same command goes on from there" in stopped.stdout
    if "middle" in how:
        assert any("tmp" in p.name for p in (run / "checkpoints").iterdir())
    resumed = child(config_file)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step " in resumed.stdout
    if resumed_at is not None:
        assert f"resumed at step {resumed_at} " in resumed.stdout
    assert log_of(run) == log_of(straight)
    (config, params), (_, expected) = load_weights(run), load_weights(straight)
    assert config.steps == 20 and same_weights(params, expected)
    assert not any("tmp" in p.name for p in (run / "checkpoints").iterdir())


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
    (run / ".hf.partial-99999999").mkdir()  # of an export that was killed
    assert cli(config_file) == 0
    assert not (run / "hf").exists() and "is complete" in capsys.readouterr().out
    assert cli(config_file, *end) == 0
    assert "sample: a|" in capsys.readouterr().out
    assert (run / "hf" / "config.json").is_file() and not list(run.glob(".hf*"))
    assert cli(config_file, *end) == 0
    assert "sample: a|" not in capsys.readouterr().out


def test_a_checkpoint_that_holds_nan_is_set_aside(tmp_path):
    config = settings()
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    good = create_state(config, model, optimizer)
    said = []
    with contextlib.closing(Checkpointer(tmp_path, config.checkpoint)) as checkpointer:
        for step, state in ((1, good), (2, poisoned(good))):
            state = state.replace(step=jnp.asarray(step, jnp.int32))
            resume.save(checkpointer, config, state, step, {}, resume.Progress())
            checkpointer.wait()
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
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli(config_file, "steps=22") == 1
    assert one_error(
        capsys,
        "a checkpoint could not be written",
        "it takes 7.9 MiB, and 1.0 MiB are free",
        "Step 20 is the last complete one",
    )
    monkeypatch.undo()
    assert same_weights(load_weights(run)[1], load_weights(straight)[1])


def test_a_disk_that_fills_up_while_saving(config_file, tmp_path):
    """The limit on the size of a file stands in for the disk; the earlier checkpoint stays usable."""
    fits = child(config_file, "", "steps=7", "evaluation.interval=100")
    assert fits.returncode == 0, fits.stderr
    before = load_weights(tmp_path / "run")[1]
    full = child(
        config_file,
        "import resource; at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))",
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

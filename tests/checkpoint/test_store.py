"""Items of a step: frozen weights and trained ones apart, formats, and what an older version wrote."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.training import MODEL, RECORDER, packed_batch, settings, start
from orbax.checkpoint._src.path import atomicity

from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError, StoredStep, first_line
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.config import CheckpointConfig
from stellarbyte_jax.launch import processes
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import resume
from stellarbyte_jax.training.resume import Progress
from stellarbyte_jax.training.state import state_shapes


def not_embedding(path):
    return path[0] != "embed"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def checkpointer(tmp_path):
    made = Checkpointer(tmp_path / "run", CheckpointConfig())
    yield made
    made.close()


def restore(checkpointer, config, is_trainable):
    shapes = state_shapes(config, ByteTransformer(config.model), RECORDER, is_trainable)
    return resume.restore(checkpointer, config, shapes, RECORDER, print)


def test_frozen_weights_are_an_item_of_their_own(checkpointer, tmp_path):
    """Nothing of them is among the trained ones, the average or the optimizer; all weights are exported."""
    config = settings(ema_decay=0.5)
    state, step = start(config, RECORDER, not_embedding)
    state, _ = step(state, packed_batch())
    progress = Progress(2.5, 1, last_loss=2.75)
    resume.save(checkpointer, config, state, 1, {"group": 3}, progress)
    checkpointer.wait()
    found = restore(checkpointer, config, not_embedding)
    assert_same(found.state, state)
    assert found.data == {"group": 3} and found.progress == progress
    directory = tmp_path / "run" / "checkpoints" / "1"
    with ocp.StandardCheckpointer() as reader:
        for item, held in (("params", False), ("ema", False), ("optimizer", False), ("frozen", True)):
            assert ("embed" in str(reader.metadata(directory / item).item_metadata.tree)) == held, item
    assert_same(load_weights(tmp_path / "run")[1], jax.device_get(state.averaged))
    with pytest.raises(CheckpointError, match=r"embed/embedding is frozen there or here alone"):
        restore(checkpointer, config, lambda path: True)


def test_an_older_checkpoint_tells_by_its_loss_whether_its_step_was_validated(checkpointer, monkeypatch):
    config = settings()
    shapes = state_shapes(config, ByteTransformer(config.model), RECORDER)
    read = StoredStep.json
    newer = ("unvalidated", "validated", "validation", "last_loss")
    monkeypatch.setattr(
        StoredStep,
        "json",
        lambda self, item: {k: v for k, v in read(self, item).items() if item == "config" or k not in newer},
    )
    for step, loss in ((1, 2.5), (2, None)):
        resume.save(checkpointer, config, start(config, RECORDER)[0], step, {}, Progress(2.5, 1), loss)
        checkpointer.wait()
        found = resume.restore(checkpointer, config, shapes, RECORDER, print)
        assert found is not None and found.progress == Progress(2.5, 1, validated=1 if loss else None)


def test_foreign_weights_are_split_into_trained_and_frozen_ones(tmp_path):
    config = settings(ema_decay=0.5)
    weights = jax.device_get(start(config, RECORDER)[0].params)
    save_initial(tmp_path / "run", MODEL, weights)
    checkpointer = Checkpointer(tmp_path / "run", CheckpointConfig())
    found = restore(checkpointer, config, not_embedding)
    checkpointer.close()
    assert found.data is None and int(found.state.step) == 0
    assert list(found.state.frozen) == ["embed"] and "embed" not in found.state.params
    assert_same(found.state.weights, weights)
    assert_same(found.state.averaged, weights)


def test_what_libraries_say_of_a_file_stays_one_short_line():
    said = first_line(OSError("a\x1b[2J" + "x" * 10**6 + "why\nmore"))
    assert said.startswith("OSError: a\\x1b[2Jx") and said.endswith("why") and len(said) < 400


def as_an_earlier_version_wrote_it(checkpoint):
    shutil.rmtree(checkpoint / "format")
    listing = checkpoint / "_CHECKPOINT_METADATA"
    values = json.loads(listing.read_text())
    del values["item_handlers"]["format"]
    listing.write_text(json.dumps(values))


def test_a_checkpoint_of_an_earlier_format_is_refused_in_one_line(tmp_path):
    config = settings()
    weights = jax.device_get(start(config, RECORDER)[0].params)
    save_initial(tmp_path / "run", MODEL, weights)
    as_an_earlier_version_wrote_it(tmp_path / "run" / "checkpoints" / "0")
    message = r"is a checkpoint of format 1, this version reads 2: convert it to the Hugging Face format with"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(tmp_path / "run")
    assert "\n" not in str(caught.value)
    checkpointer = Checkpointer(tmp_path / "run", CheckpointConfig())
    with pytest.raises(CheckpointError, match=message):
        restore(checkpointer, config, lambda path: True)
    checkpointer.close()
    assert not (tmp_path / "run" / "corrupt").exists()


NO_LOOP = """
import asyncio, errno, os, sys, threading
from pathlib import Path
import jax.numpy as jnp
from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError
from stellarbyte_jax.config import CheckpointConfig
from stellarbyte_jax.launch import quiet_libraries

def open_loop(opened=asyncio.new_event_loop):
    if threading.current_thread() is not threading.main_thread():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return opened()

quiet_libraries()
checkpointer = Checkpointer(Path(sys.argv[1]), CheckpointConfig())
asyncio.new_event_loop = asyncio.events.new_event_loop = open_loop
try:
    checkpointer.save(1, {"params": {"a": jnp.ones(3)}}, {"data": {"at": 1}}, frozen=[])
    checkpointer.wait()
except CheckpointError as error:
    print(error)
"""


def test_a_program_whose_save_fails_ends(tmp_path):
    """Threads make the directories, which fail here as where no file can be opened; others must not wait for them."""
    done = subprocess.run(
        [sys.executable, "-c", NO_LOOP, str(tmp_path / "run")], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "a limit on open files is in force" in done.stdout


def test_a_checkpoint_is_replaced_when_it_is_whole(checkpointer, monkeypatch):
    """The one before it may still be on its way to the disk."""
    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def slow(self, *args, **kwargs):
        await asyncio.sleep(0.3)
        return await finalize(self, *args, **kwargs)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", slow)
    for place in (1, 2):
        checkpointer.save(7, {"params": {"a": np.ones(3)}}, {"data": place}, frozen=[])
    checkpointer.wait()
    assert checkpointer.restore(lambda stored: (stored.step, stored.json("data")), print) == (7, 2)
    assert sorted(p.name for p in checkpointer.directory.parent.iterdir()) == ["checkpoints"]


def test_checkpoints_on_another_file_system_are_replaced_too(tmp_path, monkeypatch):
    """Where ``checkpoints`` is a link or a volume, nothing can be renamed into the folder above it."""
    volume, run = tmp_path / "volume", tmp_path / "run"
    volume.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(volume)
    rename = Path.rename

    def within_one(path, target):
        if len({volume in Path(place).parent.resolve().joinpath("x").parents for place in (path, target)}) > 1:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", within_one)
    config = settings()
    with contextlib.closing(Checkpointer(run, CheckpointConfig())) as checkpointer:
        for best in (2.5, 1.5):
            resume.save(checkpointer, config, start(config, RECORDER)[0], 3, {}, Progress(best))
        found = restore(checkpointer, config, lambda path: True)
    assert found.progress.best_loss == 1.5 and [path.name for path in volume.iterdir()] == ["3"]


@pytest.mark.parametrize("folder", ["checkpoints/replaced", "replaced"])
def test_a_checkpoint_whose_replacement_was_killed_comes_back(folder, tmp_path):
    """Earlier versions set it aside beside the checkpoints."""
    run, config = tmp_path / "run", settings()
    with contextlib.closing(Checkpointer(run, CheckpointConfig())) as checkpointer:
        resume.save(checkpointer, config, start(config, RECORDER)[0], 3, {}, Progress(2.5))
    (run / folder).mkdir()
    (run / "checkpoints" / "3").rename(run / folder / "3")
    with contextlib.closing(Checkpointer(run, CheckpointConfig())) as checkpointer:
        assert restore(checkpointer, config, lambda path: True).progress.best_loss == 2.5
    assert not (run / folder).exists()


@pytest.mark.parametrize("main", [True, False])
def test_a_step_that_another_process_cannot_read_is_read_by_none(main, checkpointer, monkeypatch):
    """All go on from one step, and one of them sets the other aside."""
    for step in (1, 2):
        checkpointer.save(step, {"params": {"a": np.ones(3)}}, {}, frozen=[])
    checkpointer.wait()
    answers, told = [OSError("process 1: params/a differs"), None], []
    monkeypatch.setattr(processes, "first_error", lambda error: error or answers.pop(0))
    monkeypatch.setattr(processes, "is_main", lambda: main)
    assert checkpointer.restore(lambda stored: stored.step, told.append) == 1
    assert len(told) == 1 and "checkpoint 2 is unreadable (OSError: process 1: params/a differs)" in told[0]
    assert (checkpointer.directory.parent / "corrupt" / "2").exists() == main
    assert (checkpointer.directory / "2").exists() != main

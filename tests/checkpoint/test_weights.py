"""Weights of a run: which checkpoint and which item of it are taken, and runs that begin with foreign weights."""

import dataclasses
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.hf_models import assert_same_tree, random_model, small_config
from helpers.live_arrays import LiveArrays

from stellarbyte_jax.checkpoint import leafwise, store
from stellarbyte_jax.checkpoint.checksum import array_checksums
from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import (
    load_lazy_weights,
    load_training_facts,
    load_weights,
    run_and_step,
    save_initial,
)
from stellarbyte_jax.config import ByteConfig, CheckpointConfig, ConfigError, DataConfig, TrainConfig
from stellarbyte_jax.hf.card import TrainingFacts
from stellarbyte_jax.model.lazy import LazyArray, as_numpy
from stellarbyte_jax.model.trees import merge, partition

CONFIG = small_config(num_hidden_layers=1)
WEIGHTS = random_model(num_hidden_layers=1)[1]


def times(factor: int, tree: Any = WEIGHTS) -> Any:
    return {name: times(factor, x) if isinstance(x, dict) else x * np.float32(factor) for name, x in tree.items()}


def write(run: Path, steps: dict[int, dict[str, Any]], frozen: list[str] | None = None, **config: Any) -> None:
    """Checkpoints with these items, as training writes them."""
    settings = TrainConfig(output_dir=str(run), steps=200, model=CONFIG, data=DataConfig(sequence_length=16))
    checkpointer = Checkpointer(run, CheckpointConfig(keep_latest=9))
    for step, arrays in steps.items():
        checkpointer.save(step, arrays, {"config": settings.to_dict() | config}, frozen=frozen or [])
    checkpointer.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights are the step's number times the same ones."""
    directory = tmp_path_factory.mktemp("weights") / "run"
    write(directory, {step: {"params": times(step)} for step in (3, 20, 100)})
    return directory


def test_a_run_and_one_of_its_checkpoints_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert run_and_step(run) == (run, None)
    assert run_and_step(run, 3) == (run, 3)
    assert run_and_step(run / "checkpoints" / "20") == (run, 20)
    assert run_and_step(run / "checkpoints" / "20", 0) == (run, 0)
    assert run_and_step(run / "checkpoints") == (run / "checkpoints", None)
    assert run_and_step(run / "checkpoints" / "20.tmp") == (run / "checkpoints" / "20.tmp", None)
    (run / "checkpoints" / "7").mkdir(parents=True)
    monkeypatch.chdir(run / "checkpoints" / "7")
    assert run_and_step(Path()) == (run, 7)


def test_the_newest_checkpoint_or_the_named_one(run: Path) -> None:
    config, params = load_weights(run)
    assert config.model == CONFIG and config.data.sequence_length == 16
    assert_same_tree(params, times(100))  # the newest by number, not by name
    assert isinstance(params["final_norm"]["scale"], np.ndarray)
    assert_same_tree(load_weights(str(run), 3)[1], times(3))


def test_a_relative_directory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert_same_tree(load_weights("run", 20)[1], times(20))


def test_the_average_goes_before_the_weights(tmp_path: Path) -> None:
    write(tmp_path, {4: {"params": times(4), "ema": times(5)}})
    assert_same_tree(load_weights(tmp_path)[1], times(5))


@pytest.mark.parametrize("item", ["params", "ema"])
def test_frozen_weights_are_put_back(tmp_path: Path, item: str) -> None:
    trained, frozen = partition(times(2), lambda path: path[0] != "embed")
    arrays = {"params": times(3, trained), "frozen": frozen, item: trained}
    write(tmp_path, {4: arrays}, frozen=["embed/embedding"])
    assert_same_tree(load_weights(tmp_path)[1], merge(trained, frozen))


def test_directories_without_checkpoints(tmp_path: Path) -> None:
    message = rf"^{tmp_path} holds no checkpoint: expected a run directory with checkpoints/STEP inside$"
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path)
    (tmp_path / "checkpoints" / "7.partial").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path)


def test_a_step_that_is_not_there(run: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{run} has no checkpoint of step 7; there are 3, 20, 100$"):
        load_weights(run, 7)


@pytest.mark.parametrize("file", ["params/_METADATA", "config/metadata", "format/metadata"])
def test_a_broken_checkpoint_is_named(file: str, tmp_path: Path) -> None:
    write(tmp_path, {step: {"params": times(step)} for step in (1, 2)})
    (tmp_path / "checkpoints" / "2" / file).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is unreadable: \w+: .*\. Name another step$") as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert_same_tree(load_weights(tmp_path, 1)[1], times(1))


def test_weights_that_do_not_fit_their_own_settings_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {1: {"params": WEIGHTS}}, model=dataclasses.replace(CONFIG, qk_norm=True).to_dict())
    with pytest.raises(CheckpointError, match=r"checkpoints/1 is unreadable: \w+: .*\. Name another step$"):
        load_weights(tmp_path)


def test_a_setting_that_this_version_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path, {1: {"params": WEIGHTS}}, dreams=True)
    with pytest.raises(ConfigError, match="there is no setting 'dreams'"):
        load_weights(tmp_path)


def test_foreign_weights_are_step_0_of_a_run(tmp_path: Path) -> None:
    save_initial(tmp_path / "run", CONFIG, WEIGHTS, "words")
    directory = tmp_path / "run" / "checkpoints" / "0"
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"params", "config", "format"}
    with ocp.StandardCheckpointer() as reader:
        assert_same_tree(reader.restore(directory / "params"), WEIGHTS)
    config, params = load_weights(tmp_path / "run")
    assert_same_tree(params, WEIGHTS)
    assert config.model == CONFIG and config.output_dir == str(tmp_path / "run")
    assert config.data == DataConfig(sequence_length=64, tokenizer="words")


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"max_position_embeddings": 2048}, DataConfig(sequence_length=1024)),
        ({"memory": {"length": 4}}, DataConfig(sequence_length=64, arrangement="contiguous")),
    ],
    ids=str,
)
def test_the_rows_that_foreign_weights_are_trained_with(
    settings: dict[str, Any], data: DataConfig, tmp_path: Path
) -> None:
    config = ByteConfig(**(CONFIG.to_dict() | settings))
    save_initial(tmp_path, config, WEIGHTS)
    stored, _ = load_weights(tmp_path)
    assert stored.model == config and stored.data == data


def test_a_run_that_has_checkpoints_does_not_begin_again(tmp_path: Path) -> None:
    save_initial(tmp_path, CONFIG, WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path} already has checkpoints \(\[0\]\): choose an empty dir"):
        save_initial(tmp_path, CONFIG, times(2))
    assert os.listdir(tmp_path / "checkpoints") == ["0"]
    assert_same_tree(load_weights(tmp_path)[1], WEIGHTS)


def write_trained(run: Path, facts: dict[int, dict[str, Any]]) -> None:
    """Checkpoints with an optimizer and with what training remembers of its validations."""
    settings = TrainConfig(output_dir=str(run), steps=200, model=CONFIG, data=DataConfig(sequence_length=16))
    checkpointer = Checkpointer(run, CheckpointConfig(keep_latest=9))
    arrays = {"params": WEIGHTS, "optimizer": {"count": np.zeros((), np.int32)}}
    for step, data in facts.items():
        checkpointer.save(step, arrays, {"config": settings.to_dict(), "data": data}, frozen=[])
    checkpointer.close()


def test_what_is_known_of_the_training(tmp_path: Path) -> None:
    """The validation loss is told where it is of this very step; of weights that a run began with nothing is."""
    measured = {"best_loss": 2.5, "stale": 1, "validated": 20, "last_loss": 2.75}
    older = {"best_loss": 2.5, "stale": 0}
    write_trained(tmp_path / "run", {3: older, 20: measured, 30: measured})
    assert load_training_facts(tmp_path / "run") == TrainingFacts(30, 30 * 32 * 16, "adamw", None, True)
    assert load_training_facts(tmp_path / "run", 20) == TrainingFacts(20, 20 * 32 * 16, "adamw", 2.75, True)
    assert load_training_facts(tmp_path / "run", 3) == TrainingFacts(3, 3 * 32 * 16, "adamw", None, True)
    save_initial(tmp_path / "foreign", CONFIG, WEIGHTS)
    assert load_training_facts(tmp_path / "foreign") is None
    data = tmp_path / "run" / "checkpoints" / "20" / "data" / "metadata"
    data.write_text(data.read_text().replace("2.75", "1.75"))
    with pytest.raises(CheckpointError, match="data differs from its checksum"):
        load_training_facts(tmp_path / "run", 20)
    assert_same_tree(load_weights(tmp_path / "run", 20)[1], WEIGHTS)


def test_nothing_is_printed_about_a_directory_that_is_read(tmp_path, caplog):
    model, params = random_model()
    save_initial(tmp_path / "run", model.config, params)
    absl = logging.getLogger("absl")
    before = absl.level
    caplog.clear()
    load_weights(tmp_path / "run")
    assert caplog.records == [] and absl.level == before


def test_weights_that_are_read_later_are_the_same(tmp_path: Path) -> None:
    trained, frozen = partition(times(2), lambda path: path[0] != "embed")
    arrays = {"params": times(3, trained), "frozen": frozen, "ema": times(5, trained)}
    write(tmp_path, {4: {"params": WEIGHTS}}, frozen=[])
    write(tmp_path, {7: arrays}, frozen=["embed/embedding"])
    config, later = load_lazy_weights(tmp_path)
    assert config.model == CONFIG and all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(later))
    expected = merge(times(5, trained), frozen)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), later) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    assert_same_tree(jax.tree.map(as_numpy, later), expected)
    assert_same_tree(jax.tree.map(as_numpy, load_lazy_weights(tmp_path, 4)[1]), WEIGHTS)


def test_what_is_read_later_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the settings before, and against its checksum when it is read; the checkpoint is named then too."""
    other = dataclasses.replace(CONFIG, qk_norm=True).to_dict()
    write(tmp_path / "other", {1: {"params": WEIGHTS}}, model=other)
    message = r"checkpoints/1 is unreadable: ValueError: the arrays of params and those of the settings differ in \S+"
    with pytest.raises(CheckpointError, match=rf"{message}_norm/scale.*\. Name another step$"):
        load_lazy_weights(tmp_path / "other")
    write(tmp_path / "more", {1: {"params": {**WEIGHTS, "head": {"bias": np.zeros(3, np.float32)}}}})
    with pytest.raises(CheckpointError, match=r"the arrays of params and those of the settings differ in head/bias"):
        load_lazy_weights(tmp_path / "more")
    write(tmp_path / "run", {2: {"params": WEIGHTS}})
    _, later = load_lazy_weights(tmp_path / "run")
    read = store.read_leaf
    monkeypatch.setattr(store, "read_leaf", lambda *what: read(*what) + np.float32(1))
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is unreadable: OSError: params/final_norm/scale differs"):
        later["final_norm"]["scale"].read()
    monkeypatch.setattr(store, "read_leaf", read)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "params" / "d")
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is unreadable: \w+: .*\. Name another step$") as caught:
        later["embed"]["embedding"].read()
    assert "\n" not in str(caught.value)


def test_weights_are_written_one_after_another(tmp_path: Path) -> None:
    """When one is read, the one before it is on disk and gone; what was written is what is read."""
    memory = LiveArrays()
    save_initial(tmp_path / "run", CONFIG, jax.tree.map(memory.lazy, WEIGHTS), "words")
    leaves = jax.tree.leaves(WEIGHTS)
    assert memory.made == 2 * len(leaves)  # for the checksum, and for the file
    assert memory.peak == max(leaf.nbytes for leaf in leaves)
    assert_same_tree(load_weights(tmp_path / "run")[1], WEIGHTS)


class Uncopied(np.ndarray):
    """An array that must not be copied, as orbax does with those that others may change meanwhile."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")


def test_weights_are_written_without_a_copy(tmp_path: Path) -> None:
    lazies = jax.tree.map(lambda x: LazyArray(x.shape, x.dtype, lambda: x.view(Uncopied)), WEIGHTS)
    save_initial(tmp_path / "run", CONFIG, lazies)
    assert_same_tree(load_weights(tmp_path / "run")[1], WEIGHTS)


def test_known_checksums_are_taken(tmp_path: Path) -> None:
    save_initial(tmp_path / "run", CONFIG, WEIGHTS, checksums=array_checksums(WEIGHTS))
    assert_same_tree(load_weights(tmp_path / "run")[1], WEIGHTS)
    save_initial(tmp_path / "wrong", CONFIG, WEIGHTS, checksums=array_checksums(times(2)))
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        load_weights(tmp_path / "wrong")


@pytest.mark.parametrize("training", [True, False])
def test_arrays_lie_in_parts_on_the_disk(training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who reads one holds little besides; in a file each where nothing may wait in memory to be written."""
    monkeypatch.setattr(leafwise, "_PART", 2**10)
    if training:
        write(tmp_path, {0: {"params": WEIGHTS}})
    else:
        save_initial(tmp_path, CONFIG, WEIGHTS)
    with ocp.PyTreeCheckpointer() as reader:
        found: Any = reader.metadata(tmp_path / "checkpoints" / "0" / "params").item_metadata
    parts = [4 * math.prod(leaf.storage.chunk_shape) for leaf in jax.tree.leaves(found.tree)]
    assert (tmp_path / "checkpoints" / "0" / "params" / "manifest.ocdbt").exists() == training
    assert max(parts) == 2**10 < max(leaf.nbytes for leaf in jax.tree.leaves(WEIGHTS))
    assert_same_tree(load_weights(tmp_path)[1], WEIGHTS)
    assert_same_tree(jax.tree.map(as_numpy, load_lazy_weights(tmp_path)[1]), WEIGHTS)

"""The directory of a run: a start that fails leaves none, and one that was there as it was."""

import shutil
import sys
import types
from pathlib import Path

import pytest
from helpers.runs import ROOT, at_step, cli, data_setting, one_error

from stellarbyte_jax.data.shards import prepare
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.launch import RunLock
from stellarbyte_jax.training.directory import RunDirectory

TINY = ("steps=2", "schedule.warmup_steps=0")


def without_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    return ["logging.trackers=wandb"], "pip install wandb"


def without_login(tmp_path, monkeypatch):
    def init(dir, **settings):
        (Path(dir) / "wandb").mkdir()
        raise RuntimeError("no key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return ["logging.trackers=wandb"], "wandb login"


def of_another_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a river"}\n' * 9)
    text = TextFormat(("text",), None)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "shards", str(ROOT / "tokenizer"), text=text, workers=0)
    return [f"data.train={tmp_path / 'shards'}"], "tokenizer"


def damaged_data(tmp_path, monkeypatch):
    return [data_setting(tmp_path, '{"text": "a"}\n{"text": oh}\n')], "bad.jsonl:2"


def full_disk(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    return [], "/today/tokenizer could not be written: No space left"


CAUSES = [without_wandb, without_login, of_another_tokenizer, damaged_data, full_disk]


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_start_that_fails_leaves_no_directory(cause, config_file, tmp_path, capsys, monkeypatch):
    changes, part = cause(tmp_path, monkeypatch)
    capsys.readouterr()
    place = tmp_path / "runs" / "of" / "today"
    assert cli(config_file, *TINY, *changes, f"output_dir={place}") == 1
    assert one_error(capsys, part)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("cause", CAUSES)
def test_a_directory_that_was_there_is_left_as_it_was(cause, config_file, tmp_path, capsys, monkeypatch):
    changes, part = cause(tmp_path, monkeypatch)
    capsys.readouterr()
    place = tmp_path / "runs" / "today"
    for notes in ({}, {"notes.txt": "mine", "sub/tokenizer": "x"}):
        for name, text in notes.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text)
        place.mkdir(parents=True, exist_ok=True)
        before = tree(tmp_path / "runs")
        assert cli(config_file, *TINY, *changes, f"output_dir={place}") == 1
        assert one_error(capsys, part)
        assert tree(tmp_path / "runs") == before


def test_a_run_keeps_what_a_failed_start_of_it_finds(config_file, straight, tmp_path, capsys, monkeypatch):
    shutil.copytree(straight, tmp_path / "run")
    before = tree(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli(config_file, "steps=21", "logging.trackers=wandb") == 1
    assert one_error(capsys, "pip install wandb", f"(details: {tmp_path / 'run' / 'train.log'})")
    after = tree(tmp_path / "run")
    assert before.keys() <= after.keys()
    kept = [path for path in before if path.is_relative_to(tmp_path / "run" / "checkpoints") or path.suffix == ".jsonl"]
    assert kept and all(before[path] == after[path] for path in kept)


def test_what_came_after_the_first_step_is_kept(config_file, tmp_path, capsys):
    def fail():
        raise ValueError("at step 2")

    with at_step(2, fail):
        assert cli(config_file) == 1
    assert one_error(capsys, f"error: at step 2 (details: {tmp_path / 'run' / 'train.log'})")
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0


def test_a_path_that_cannot_be_made_whole_is_not_made_in_part(tmp_path):
    place = tmp_path / "a" / "b" / ("x" * 300)
    with pytest.raises(OSError, match="cannot be made"), RunDirectory(place).locked():
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_what_another_program_puts_there_stays(tmp_path):
    place = tmp_path / "a" / "run"
    with pytest.raises(RuntimeError), RunDirectory(place).locked():
        (tmp_path / "a" / "theirs").touch()
        (place / "link").symlink_to(tmp_path / "a")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]


def test_of_a_run_that_is_moved_away_the_folder_stays(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "today")
    with pytest.raises(OSError, match="is no longer there"), directory.locked():
        directory.keep()
        (tmp_path / "runs" / "today").rename(tmp_path / "moved")
        directory.check()
    assert (tmp_path / "runs").is_dir()


def test_a_directory_in_use_is_left_to_its_user(tmp_path):
    with RunDirectory(tmp_path / "run").locked():
        (tmp_path / "run" / "mine").touch()
        with pytest.raises(OSError, match="is in use by process"), RunDirectory(tmp_path / "run").locked():
            raise AssertionError
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["mine", "run.lock"]


def test_a_run_that_came_between_is_kept(tmp_path, monkeypatch):
    """Another process may train, and end, after this one has found the directory and before it has its lock."""
    enter = RunLock.__enter__

    def late(lock):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "run.lock").touch()
        return enter(lock)

    monkeypatch.setattr(RunLock, "__enter__", late)
    with pytest.raises(RuntimeError), RunDirectory(tmp_path / "run").locked():
        raise RuntimeError
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize("sign", ["checkpoints/5", "train_config.json"])
def test_what_a_start_sets_aside_or_puts_back_in_a_run_stays(sign, tmp_path):
    (tmp_path / sign).parent.mkdir(exist_ok=True)
    (tmp_path / sign).touch()
    with pytest.raises(RuntimeError), RunDirectory(tmp_path).locked():
        (tmp_path / "corrupt").mkdir()
        (tmp_path / "hf").mkdir()
        raise RuntimeError
    assert {"corrupt", "hf"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / sign).unlink()
    if sign.startswith("checkpoints"):
        (tmp_path / "checkpoints").rmdir()
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(RuntimeError), RunDirectory(tmp_path).locked():
        (tmp_path / "hf").mkdir()
        (tmp_path / "tokenizer").mkdir()
        raise RuntimeError
    assert {path.name for path in tmp_path.iterdir()} == {"corrupt", "hf", "run.lock"}, "of an export alone"

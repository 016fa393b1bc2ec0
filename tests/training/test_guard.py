"""Is every mistake one clear line?"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers.runs import cli, data_setting, one_error

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.launch import RunLock, processes
from stellarbyte_jax.training.guard import run_guarded

MISTAKES = {
    "missing data file": (lambda t: ["data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
    "empty data file": (lambda t: [data_setting(t, "")], ["bad.jsonl"]),
    "bad JSON": (lambda t: [data_setting(t, '{"text": "a"}\n{"text": oh}\n')], ["bad.jsonl:2"]),
    "validation without text": (
        lambda t: [data_setting(t, '{"text": ""}\n' * 99).replace("train", "validation")],
        ["data.validation", "bad.jsonl holds no token to predict"],
    ),
    "missing field": (lambda t: [data_setting(t, '{"body": "a"}\n')], ["bad.jsonl:1", "'text'", "body"]),
    "tokenizer bigger than the vocabulary": (lambda t: ["model.vocab_size=100"], ["100", "288"]),
    "no tokenizer": (lambda t: ["data.tokenizer=nowhere"], ["nowhere"]),
    "not exportable": (
        lambda t: ["export_at_end=true", "model.attention_prune_below=0.1"],
        ["attention_prune_below"],
    ),
    "loss that diverges": (
        lambda t: ["optimizer.learning_rate=1e30", "optimizer.gradient_clip_norm=none", "schedule.warmup_steps=0"],
        ["the gradient norm is nan at step", "learning_rate"],
    ),
    "unwritable output": (
        lambda t: ["output_dir=/dev/null/run"],
        ["/dev/null/run cannot be made: Not a directory; a folder of its path is a file: choose another"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, config_file, tmp_path, capsys):
    make, parts = MISTAKES[mistake]
    assert cli(config_file, *make(tmp_path)) == 1
    assert one_error(capsys, *parts)
    assert mistake in ("loss that diverges", "bad JSON") or not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("train_config.json", Path.mkdir, "Is a directory; there is a folder where a file belongs: move it"),
        ("tokenizer", Path.touch, "File exists; there is a file where a folder belongs: move it"),
        ("run.lock", Path.mkdir, "Is a directory; there is a folder where a file belongs: move it"),
        ("train.log", Path.mkdir, "Is a directory; there is a folder where a file belongs: move it"),
        ("metrics.jsonl.partial", Path.mkdir, "Is a directory; there is a folder where a file belongs: move it"),
    ],
)
def test_a_file_of_the_run_that_cannot_be_written_is_named_with_what_to_do(
    name, make, reason, config_file, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    assert cli(config_file) == 1
    assert one_error(
        capsys, f"error: {tmp_path / 'run' / name} could not be written: {reason} or choose another output"
    )


def test_a_tokenizer_that_cannot_be_copied_is_named_with_what_to_do(config_file, tmp_path, capsys, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    def unreadable(source, target):
        raise PermissionError(13, "Permission denied", str(source))

    for copyfile, parts in (
        (full, [f"{tmp_path / 'run' / 'tokenizer'} could not be written: No space left on device; the disk is full"]),
        (unreadable, ["tokenizer.json could not be read: Permission denied; make it readable, start again"]),
    ):
        monkeypatch.setattr(shutil, "copyfile", copyfile)
        assert cli(config_file) == 1
        assert one_error(capsys, *parts)


def test_what_the_system_says_without_a_name_has_advice(tmp_path, capsys):
    def act():
        raise OSError(24, "Too many open files")

    (tmp_path / "train.log").write_text("before\n")
    assert run_guarded(act, str(tmp_path)) == 1
    assert one_error(capsys, "error: Too many open files; a limit on open files is in force (ulimit -n): raise it")
    logged = (tmp_path / "train.log").read_text()
    assert logged.startswith("before\nTraceback") and logged.endswith("OSError: [Errno 24] Too many open files\n")

    def foreign():
        raise OSError(13, "Permission denied", "/elsewhere")

    assert run_guarded(foreign, str(tmp_path)) == 1
    assert one_error(capsys, "error: [Errno 13] Permission denied: '/elsewhere' (details")


def test_a_mistyped_command_line(config_file, tmp_path, capsys):
    for settings, parts in {
        ("model.hiden_size=3",): ["model.hiden_size", "did you mean model.hidden_size"],
        ("model.num_attention_heads=3",): ["16", "3", "not divisible"],
        ("steps=many",): ["steps", "many"],
    }.items():
        assert cli(config_file, *settings) == 2
        assert one_error(capsys, *parts)
    assert cli(tmp_path / "tinny.py") == 2
    assert one_error(capsys, "tinny.py", "did you mean", "tiny.py")


def test_a_tracker_that_is_not_installed(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli(config_file, "logging.trackers=wandb") == 1
    assert one_error(capsys, "'wandb'", "pip install wandb")


def test_a_directory_without_a_run_gets_no_log(tmp_path, capsys):
    def act():
        raise ValueError("no tokenizer")

    for place in (tmp_path, tmp_path / "none"):
        assert run_guarded(act, str(place)) == 1
        assert capsys.readouterr().err == "error: no tokenizer\n"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_place_for_a_run_gets_no_log(tmp_path):
    def act():
        raise ConfigError("output_dir holds a project")

    with pytest.raises(ConfigError, match="holds a project"):
        run_guarded(act, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_log_is_the_main_processs(tmp_path, capsys, monkeypatch):
    def act():
        raise ValueError("no tokenizer")

    (tmp_path / "train.log").write_text("before\n")
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert run_guarded(act, str(tmp_path)) == 1
    assert capsys.readouterr().err == "error: no tokenizer\n"
    assert (tmp_path / "train.log").read_text() == "before\n"


def test_a_run_in_use_keeps_its_log_for_itself(config_file, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    before = (tmp_path / "run" / "train.log").read_bytes()
    with RunLock(tmp_path / "run"):
        assert cli(config_file, "steps=99") == 1
        assert one_error(capsys, f"{tmp_path / 'run'} is in use by process {os.getpid()}")
    assert (tmp_path / "run" / "train.log").read_bytes() == before


def test_an_output_that_is_a_link_to_itself_is_told(config_file, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert cli(config_file, f"output_dir={tmp_path / 'loop'}") == 1
    assert one_error(capsys, f"{tmp_path / 'loop'} is a link to nothing: mend the link")

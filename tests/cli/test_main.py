"""The console command, and what a command suggests to type next."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.training import settings

import stellarbyte_jax
from stellarbyte_jax.cli import generate, train
from stellarbyte_jax.cli.main import main
from stellarbyte_jax.cli.program import COMMANDS, typed
from stellarbyte_jax.config import DataConfig, EvaluationConfig
from stellarbyte_jax.config.files import shipped
from stellarbyte_jax.training import run as training_run
from stellarbyte_jax.training.run import Finished


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"stellarbyte_jax {stellarbyte_jax.__version__}\n"


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["trian"], 2), (["--help"], 0)])
def test_what_is_no_command_lists_them(arguments, code, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr()
    assert end.value.code == code
    assert all(name in printed.out + printed.err for name in (COMMANDS if code == 0 or arguments else ["COMMAND"]))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_help_that_names_it(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/env/bin/stellarbyte", name])
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    printed = capsys.readouterr().out
    shown = "generate" if name == "chat" else name
    assert end.value.code == 0 and printed.startswith(f"usage: stellarbyte {shown} ") and "scripts/" not in printed
    assert re.search(rf"\n +stellarbyte {shown} .*\S", printed), "no example to copy"


def test_a_conversation_is_generation_with_a_flag(capsys, tmp_path):
    assert main(["chat", "--model", str(tmp_path), "--remember", "x", "--prompt-file", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    assert COMMANDS["chat"].options == ("--chat",)


def test_what_a_command_adds_goes_before_what_was_typed(monkeypatch):
    given = []
    monkeypatch.setattr(generate, "main", lambda words: given.append(words) or 0)
    for name in ("chat", "generate"):
        assert main([name, "--model", "x"]) == 0
    assert given == [["--chat", "--model", "x"], ["--model", "x"]]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("scripts/train.py", "python scripts/generate.py"),
        ("/a b/scripts/train.py", "python '/a b/scripts/generate.py'"),
        ("/env/bin/stellarbyte", "stellarbyte generate"),
        ("/repo/stellarbyte_jax/__main__.py", "stellarbyte generate"),
    ],
)
def test_commands_are_written_as_they_were_typed(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv])
    assert typed("generate") == expected


def _suggested(finished, config, *typed_settings, path="configs/a b.py"):
    options = argparse.Namespace(config=path, set=[*typed_settings])
    lines = train.next_commands(config, finished, options).splitlines()
    return {line.split(":")[0].strip(): shlex.split(line.partition(":")[2]) for line in lines[1:]}


@pytest.mark.parametrize(
    ("finished", "more"),
    [
        (Finished(0, 120, "steps"), "steps=240"),
        (Finished(0, 600, "steps"), "steps=1200"),  # it stands beyond what was asked for
        (Finished(0, 40, "patience"), "evaluation.patience=6"),
        (Finished(0, 40, "data"), "data.epochs=4"),
    ],
)
def test_the_command_to_go_on_repeats_what_was_typed(finished, more, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    config = settings(
        output_dir="my runs/x",
        steps=120,
        data=DataConfig(sequence_length=16, epochs=2, validation=("v.jsonl",)),
        evaluation=EvaluationConfig(patience=3),
        sample_prompts=("a 'b", "c"),
    )
    given = (
        "seed=1",
        "output_dir=my runs/x",
        "steps = 120",
        "data.train=a/*.jsonl",
        "evaluation.patience=3",
        "data.epochs=2",
    )
    suggested = _suggested(finished, config, "seed=0", *given)  # the last one counts
    name = more.partition("=")[0]
    kept = [text for text in given if text.partition("=")[0].strip() != name]
    assert suggested["go on"] == ["python", "scripts/train.py", "--config", "configs/a b.py", "--set", *kept, more]
    assert suggested["report"][2:] == ["my runs/x"]
    assert suggested["convert"][3:] == ["my runs/x", "my runs/x-hf"]
    words = suggested["generate"]
    assert words[2:6] == ["--model", "my runs/x", "--prompt", "a 'b"]
    assert float(words[words.index("--temperature") + 1]) > 0


@pytest.mark.parametrize("code", [0, 130])
def test_what_comes_next_is_told_of_a_run_that_came_to_its_end(code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_run, "train", lambda config: Finished(code, 3, "signal" if code else "steps"))
    assert train.main(["--config", "quickstart", "--set", f"output_dir={tmp_path}"]) == code
    assert ("next:" in capsys.readouterr().out) == (code == 0)


ROOT = Path(__file__).parents[2]
SHIPPED = ("configs", "data", "tokenizer")


def test_every_package_is_named_for_the_wheel():
    """Explicitly, since three folders of the clone's root lie below the package where it is installed."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "stellarbyte_jax").rglob("__init__.py")}
    assert set(named) == found | {f"stellarbyte_jax.shipped.{folder}" for folder in SHIPPED}
    assert [shipped(folder) for folder in SHIPPED] == [ROOT / folder for folder in SHIPPED]


def test_a_wheel_trains_from_any_folder(tmp_path):
    """Configs, corpus and tokenizer come with it; nothing of the clone is used."""
    source, site, home = tmp_path / "source", tmp_path / "site", tmp_path / "home"
    source.mkdir()
    home.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("stellarbyte_jax", *SHIPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--target", str(site), str(source)], check=True)
    shutil.rmtree(source)
    small = "steps=2 schedule.warmup_steps=0 export_at_end=false model.hidden_size=8 model.num_attention_heads=2"
    small += " model.intermediate_size=8 model.num_hidden_layers=1 evaluation.batches=1 sample_prompts=[]"
    command = [str(site / "bin" / "stellarbyte"), "train", "--config", "quickstart", "--set", *small.split()]
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "next:" in done.stdout and "stellarbyte train --config quickstart --set schedule.warmup_steps=0" in done.stdout
    )
    kept = json.loads((home / "runs" / "quickstart" / "train_config.json").read_text())
    for path in (*kept["data"]["train"], *kept["data"]["validation"], kept["data"]["tokenizer"]):
        assert (home / path).resolve().is_relative_to(site / "stellarbyte_jax" / "shipped")


def test_names_that_look_like_options_are_no_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    config = settings(output_dir="-x/", sample_prompts=("-foo",))
    suggested = _suggested(Finished(0, 50, "steps"), config)
    assert "--prompt=-foo" in suggested["generate"] and suggested["generate"][3] == "./-x"
    assert suggested["convert"][3:] == ["./-x", "./-x-hf"]

"""Options that are paths or names of the hub mean the same in every command."""

import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from helpers.hf_models import random_model, save_words
from helpers.runs import one_error

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.checkpoint.weights import load_config, save_initial
from stellarbyte_jax.cli import benchmark, convert, generate, info, prepare, report, tokenizer
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.tokenizer.codec import load_tokenizer

MODEL, WEIGHTS = random_model(num_hidden_layers=1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a model ``hf`` and a tokenizer ``words``; commands are typed in an empty folder of it."""
    words = save_words(tmp_path / "words", ["x", "<b>", "<e>", "y"], bos_token="<b>", eos_token="<e>")
    save_pretrained(tmp_path / "hf", MODEL, WEIGHTS, tokenizer=words)
    (tmp_path / "a.txt").write_text("y")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_is_the_home_directory_in_every_option(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["from-hf", "~/hf", "~/run"]) == 0
    assert convert.main(["to-hf", "~/run", "~/out", "--tokenizer=~/words"]) == 0
    assert convert.main(["resize", "~/out", "~/resized", "--tokenizer=~/words"]) == 0
    assert info.main(["--model=~/out", "--no-weights"]) == 0
    assert prepare.main(["--input=~/a.txt", "--output=~/shards", "--tokenizer=~/words", "--workers=0"]) == 0
    assert f"data.train={home}/shards data.tokenizer={home}/words" in capsys.readouterr().out
    assert {"run", "out", "resized", "shards"} <= set(os.listdir(home))
    prompt = ["--prompt-file=~/a.txt", "--max-new-tokens=1", "--remember=~/none.txt"]
    for main, arguments, message in (
        (generate.main, ["--model=~/out", *prompt], f"{home}/none.txt"),
        (report.main, ["~/run"], f"{home}/run/metrics.jsonl is missing"),
        (
            tokenizer.main,
            ["--output=~/words", "--corpus=a=~/a.txt", "--stage=300:a"],
            f"{home}/words holds a tokenizer",
        ),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    for parsed in (info._parse(["--config=x", "--output=~/r"]), benchmark._parse(["--output=~/r"])):
        assert parsed.output == home / "r"
    assert os.listdir(home / "here") == []
    with pytest.raises(SystemExit):
        info.main(["--model=~no.body/x"])
    assert "argument --model: ~no.body/x: there is no home directory of ~no.body: " in capsys.readouterr().err


def test_a_tilde_is_the_home_directory_in_calls(home: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{home}/none does not exist"):
        from_pretrained("~/none")
    assert load_tokenizer("~/words").path == str(home / "words")
    model, params = from_pretrained("~/hf")
    save_pretrained("~/again", model, params, tokenizer="~/words")
    assert load_bundle("~/again").tokenizer.encode("y") == [3]
    save_initial(home / "run", MODEL.config, WEIGHTS, str(home / "words"))
    assert load_bundle("~/run").tokenizer.encode("y") == [3]
    assert os.listdir(home / "here") == []


@pytest.fixture
def asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, bool]]:
    """Name, revision and whether weights were asked for, of each question to the hub; it answers with the model."""
    questions: list[tuple[str, str | None, bool]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        weights = any(fnmatch("model-1.safetensors", pattern) for pattern in allow_patterns)
        assert any(fnmatch("tokenizer.json", pattern) for pattern in allow_patterns)
        questions.append((repo_id, revision, weights))
        return str(home / "hf")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return questions


def test_every_command_takes_names_of_the_hub(
    home: Path, asked: list[tuple[str, str | None, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert info.main(["--model", "org/name", "--no-weights"]) == 0
    assert info.main(["--model", "org/name", "--revision", "v1"]) == 0
    assert asked == [("org/name", None, False), ("org/name", "v1", True)]
    asked.clear()
    assert convert.main(["resize", "org/a", "run", "--tokenizer", "org/b", "--revision", "v2"]) == 0
    assert asked == [("org/b", None, False), ("org/a", "v2", True)]
    assert load_bundle("run").tokenizer.encode("y") == [3] and load_config("run").init_from == "org/a"
    asked.clear()
    assert convert.main(["to-hf", "run", "hf", "--tokenizer", "org/b"]) == 0
    capsys.readouterr()
    assert prepare.main(["--input", "../a.txt", "--output", "shards", "--tokenizer", "org/b", "--workers", "0"]) == 0
    assert asked == [("org/b", None, False)] * 2
    assert "data.train=shards data.tokenizer=org/b model.vocab_size=4 " in capsys.readouterr().out

    (home / "here" / "org").mkdir()  # a directory goes before the hub
    save_words(home / "here" / "org" / "b", ["x", "y", "<e>"], eos_token="<e>")
    asked.clear()
    assert convert.main(["resize", "hf", "again", "--tokenizer", "org/b"]) == 0
    assert load_bundle("again").tokenizer.encode("y") == [1] and asked == []


def test_a_name_of_the_hub_does_not_lie_in_the_target(home: Path, asked: list[tuple[str, str | None, bool]]) -> None:
    assert convert.main(["resize", "org/a", "org", "--tokenizer", "org/b"]) == 0
    assert [name for name, _, _ in asked] == ["org/b", "org/a"] and load_config("org").init_from == "org/a"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (info.main, ["--model", "org/name"]),
        (convert.main, ["resize", "org/name", "run", "--tokenizer", "../words"]),
        (convert.main, ["resize", "../hf", "run", "--tokenizer", "org/name"]),
        (prepare.main, ["--input", "../a.txt", "--output", "out", "--tokenizer", "org/name"]),
    ],
)
def test_without_a_network_a_name_of_the_hub_is_one_line(
    command: Callable[[list[str]], int], arguments: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    assert command(arguments) == 1
    looked = f"error: org/name: there is no such directory here (looked from {home / 'here'}), and the hub's cache "
    assert one_error(capsys, looked, "lacks it, and HF_HUB_OFFLINE forbids asking: fetch it where there is a network")
    assert os.listdir(home / "here") == []


@pytest.mark.parametrize("command", ["from-hf", "resize"])
def test_a_conversion_records_where_its_weights_come_from(command: str, home: Path) -> None:
    more = ["--tokenizer", str(home / "words")] if command == "resize" else []
    assert convert.main([command, str(home / "hf"), "made", *more]) == 0
    assert load_config("made").init_from == str(home / "hf")

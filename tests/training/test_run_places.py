"""Where a run finds its tokenizer, typed again from elsewhere or without a network, and what it began with."""

import dataclasses
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import pytest
from helpers.runs import one_error
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import some_weights

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.checkpoint.weights import load_config
from stellarbyte_jax.cli import convert, generate
from stellarbyte_jax.cli.train import main
from stellarbyte_jax.config import ByteConfig, DataConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training.run import train

MODEL = ByteConfig(
    vocab_size=300,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
    max_position_embeddings=32,
    compute_dtype="float32",
)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and integer types inside
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, ``first``; beside it lies ``second``."""
    (tmp_path / "a.jsonl").write_text('{"text": "a river runs past the old stone bridge"}\n' * 20)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path


def settings(folder: Path, tokenizer: str, steps: int = 1, **changes: Any) -> TrainConfig:
    data = DataConfig(
        train=(str(folder / "a.jsonl"),),
        tokenizer=tokenizer,
        sequence_length=16,
        workers=0,
        cache_dir=str(folder / "cache"),
    )
    return TrainConfig(
        output_dir=str(folder / "run"),
        steps=steps,
        global_batch_size=2,
        data=data,
        schedule=ScheduleConfig(name="constant", warmup_steps=0),  # any number of steps has one program
        **({"model": MODEL} | changes),
    )


def record(run: Path) -> TrainConfig:
    """The settings that a run keeps, which are those of its last checkpoint."""
    found = TrainConfig.from_dict(json.loads((run / "train_config.json").read_text()))
    assert found == load_config(run)
    return found


def test_a_run_goes_on_from_another_folder_and_with_a_tokenizer_that_was_moved(folder, monkeypatch, capsys):
    save_byte_tokenizer(folder / "first" / "words")
    train(settings(folder, "words"))
    monkeypatch.chdir(folder / "second")
    copy = folder / "run" / "tokenizer"
    train(settings(folder, "words", 2))
    told = f"data.tokenizer: words does not exist (looked from {folder / 'second'}); its copy in {copy} is used"
    printed = capsys.readouterr().out.splitlines()
    assert printed.count("  data.tokenizer: words (default: tokenizer)") == 2, "not the copy's place"
    assert told in printed and f"resumed at step 1 from {folder / 'run'}" in printed
    assert not [line for line in printed if line.startswith("setting changed: data")]
    assert record(folder / "run").data.tokenizer == "words"

    moved = str(shutil.move(folder / "first" / "words", folder / "moved"))
    train(settings(folder, moved, 3))
    printed = capsys.readouterr().out
    assert f"resumed at step 2 from {folder / 'run'}\n" in printed and "is used" not in printed
    assert record(folder / "run").data.tokenizer == moved
    with pytest.raises(ValueError, match=r"^tokenizer directory typo does not exist \(looked from "):
        train(settings(folder, "typo", 4))  # which is not the name that the run began with


def test_the_settings_of_a_run_hold_in_another_folder(folder, monkeypatch, capsys):
    save_byte_tokenizer(folder / "first" / "words")
    train(settings(folder, "words"))
    monkeypatch.chdir(folder / "second")
    file, copy = folder / "run" / "train_config.json", folder / "run" / "tokenizer"
    assert main(["--config", str(file), "--set", "output_dir=new"]) == 0
    told = f"data.tokenizer: words does not exist (looked from {folder / 'second'}); its copy in {copy} is used"
    assert capsys.readouterr().out.splitlines().count(told) == 1
    assert record(folder / "second" / "new").data.tokenizer == str(copy)
    assert main(["--config", str(file), "--set", "steps=2"]) == 0  # the run itself
    assert capsys.readouterr().out.splitlines().count(told) == 1
    assert record(folder / "run").data.tokenizer == "words"
    assert main(["--config", str(file), "--set", "data.tokenizer=typo"]) == 1
    assert one_error(capsys, f"tokenizer directory typo does not exist (looked from {folder / 'second'})")
    shutil.rmtree(copy)
    assert main(["--config", str(file), "--set", "output_dir=other"]) == 2
    assert one_error(
        capsys,
        f"error: data.tokenizer words does not exist (looked from {folder / 'second'}), and {copy} is no copy of it: "
        "set data.tokenizer to its directory",
    )


def test_a_tokenizer_of_the_hub_is_fetched_once(folder, monkeypatch, capsys):
    save_byte_tokenizer(folder / "snapshot")
    asked: list[dict[str, Any]] = []

    def download(repo_id: str, **more: Any) -> str:
        asked.append({"repo_id": repo_id, **more})
        return str(folder / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    train(settings(folder, "org/name", sample_prompts=("a",), export_at_end=True))
    assert [question["repo_id"] for question in asked] == ["org/name"]
    patterns = asked[0]["allow_patterns"]
    assert not any(fnmatch("model.safetensors", pattern) for pattern in patterns)
    assert any(fnmatch("tokenizer.json", pattern) for pattern in patterns)
    assert record(folder / "run").data.tokenizer == "org/name"
    assert (folder / "run" / "hf" / "tokenizer.json").is_file()

    monkeypatch.undo()  # and without a network, whose lack the suite plays with HF_HUB_OFFLINE
    monkeypatch.chdir(folder / "second")
    shutil.rmtree(folder / "snapshot")
    capsys.readouterr()
    train(settings(folder, "org/name", 2))
    copy = folder / "run" / "tokenizer"
    printed = capsys.readouterr().out
    assert f"data.tokenizer: org/name is a name of the hub; its copy in {copy} is used\n" in printed
    assert f"resumed at step 1 from {folder / 'run'}\n" in printed
    assert record(folder / "run").data.tokenizer == "org/name"
    with pytest.raises(ValueError, match=r"^org/other: there is no such directory here .* HF_HUB_OFFLINE forbids"):
        train(settings(folder, "org/other", 3))


def test_a_name_of_the_hub_for_the_tokenizer_of_a_run_goes_on_with_it(folder, monkeypatch, capsys):
    words = save_byte_tokenizer(folder / "words")
    train(settings(folder, words))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: words)
    train(settings(folder, "org/name", 2))
    assert f"resumed at step 1 from {folder / 'run'}\n" in capsys.readouterr().out
    assert record(folder / "run").data.tokenizer == "org/name"


def test_a_run_records_what_it_began_with(folder, capsys):
    words = save_byte_tokenizer(folder / "words")
    save_pretrained(folder / "hf", ByteTransformer(MODEL), some_weights(MODEL), tokenizer=words)
    train(settings(folder, words, init_from=str(folder / "hf")))
    chat = shutil.copytree(folder / "hf", folder / "chat")
    shutil.rmtree(folder / "hf")
    capsys.readouterr()
    train(settings(folder, words, 2, export_at_end=True))
    assert record(folder / "run").init_from == str(folder / "hf")
    assert not any(load_bundle(path).plain_text for path in (chat, folder / "run", folder / "run" / "hf"))
    assert "init_from" not in capsys.readouterr().out
    train(settings(folder, words, 3, init_from="elsewhere"))
    told = f"setting changed: init_from '{folder / 'hf'}' -> 'elsewhere' (without effect: the run goes on with its own"
    assert told in capsys.readouterr().out
    assert record(folder / "run").init_from == str(folder / "hf")
    wide = dataclasses.replace(MODEL, hidden_size=16)
    with pytest.raises(CheckpointError, match=rf"began with the model of init_from={folder / 'hf'}: name that again"):
        train(settings(folder, words, 4, model=wide))
    with pytest.raises(ValueError, match=rf"^data\.tokenizer nowhere does not exist .* init_from={folder / 'hf'}, and"):
        train(settings(folder, "nowhere", 4))
    with pytest.raises(ValueError, match=r"^tokenizer directory nowhere does not exist"):
        train(settings(folder, "nowhere", 4, init_from=str(chat)))


def test_an_export_warns_of_chats_wherever_it_lies(folder, capsys):
    words = save_byte_tokenizer(folder / "words")
    model = dataclasses.replace(MODEL, max_position_embeddings=256)
    train(settings(folder, words, export_at_end=True, model=model))
    assert convert.main(["to-hf", str(folder / "run"), str(folder / "converted")]) == 0
    shutil.move(folder / "run" / "hf", folder / "exported")
    shutil.rmtree(folder / "run")
    for name in ("converted", "exported"):
        assert generate.main(["--model", str(folder / name), "--chat", "--prompt=a", "--max-new-tokens=1"]) == 0
        assert f"warning: {folder / name} was trained on plain text, not on conversations" in capsys.readouterr().err


def test_a_run_that_began_with_converted_weights_records_theirs(folder, monkeypatch):
    words = save_byte_tokenizer(folder / "words")
    save_pretrained(folder / "hf", ByteTransformer(MODEL), some_weights(MODEL), tokenizer=words)
    monkeypatch.chdir(folder)
    assert convert.main(["from-hf", "hf", "run"]) == 0
    train(settings(folder, words))
    assert record(folder / "run").init_from == "hf"

"""Names of the hub: which ones are, what is asked for, and what is said where nothing came. No test has a network."""

import dataclasses
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from helpers.hf_models import assert_same_tree, random_model, save_words
from huggingface_hub import constants

import stellarbyte_jax
from stellarbyte_jax import AdapterBank
from stellarbyte_jax.checkpoint.source import find_source, identity
from stellarbyte_jax.checkpoint.store import BASE, Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import load_config, load_weights
from stellarbyte_jax.cli import convert
from stellarbyte_jax.config import CheckpointConfig, DataConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.hub import is_hub_name, local_directory
from stellarbyte_jax.hf.peft import load_adapter, save_adapter
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.tokenizer.codec import load_tokenizer

MODEL, WEIGHTS = random_model(num_hidden_layers=1)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an empty cache of the hub."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "work"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The questions that the hub was asked; it answers with a model."""
    words = save_words(tmp_path / "words", ["x", "<b>", "<e>", "y"], bos_token="<b>", eos_token="<e>")
    save_pretrained(tmp_path / "snapshot", MODEL, WEIGHTS, tokenizer=words)
    questions: list[dict[str, Any]] = []

    def download(repo_id: str, **more: Any) -> str:
        questions.append({"repo_id": repo_id, **more})
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return questions


@pytest.mark.parametrize("name", ["org/name", "HuggingFaceTB/SmolLM2-1.7B_x", "a/b"])
def test_a_name_of_the_hub(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("name", "a/b/c", "./a", "./org/name", "../name", "/org/name", "org/", "/name", "~/name", "org/.name"),
        *("org/na me", "org//name", "org\\name", "org/name.", "a--b/c", "a/b..c", "", "runs/first", "https://x/y"),
        "org/näme",
    ],
)
def test_what_is_no_name_of_the_hub_is_never_asked_for(name: str, asked: list[dict[str, Any]]) -> None:
    assert not is_hub_name(name)
    with pytest.raises(ValueError, match=r"does not exist|is neither a Hugging Face directory|holds no|is no "):
        stellarbyte_jax.load_run(name)
    assert asked == []


def test_a_path_stays_a_path(folder: Path, asked: list[dict[str, Any]]) -> None:
    assert not is_hub_name(Path("org/name"))
    (folder / "org").mkdir()
    with pytest.raises(
        ValueError, match=rf"^org/name does not exist \(looked from {folder}\): give a local directory, "
    ):
        local_directory("org/name")
    (folder / "org" / "name").symlink_to(folder / "nowhere")
    assert not is_hub_name("org/name")
    (folder / "org" / "file").touch()
    with pytest.raises(ValueError, match=r"^org/file is a file: give the directory that holds it$"):
        local_directory("org/file")
    assert asked == []


def test_a_model_of_the_hub_is_used_by_its_name(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    assert_same_tree(from_pretrained("org/name", revision="v1")[1], WEIGHTS)
    bundle = stellarbyte_jax.load_run("org/name", revision="v2")
    assert bundle.tokenizer.encode("y") == [3]
    assert find_source("org/name").settings()[1] == tmp_path / "snapshot"
    assert convert.main(["from-hf", "org/name", str(tmp_path / "run"), "--revision", "v3"]) == 0
    assert_same_tree(load_weights(tmp_path / "run")[1], WEIGHTS)
    assert load_config(tmp_path / "run").init_from == "org/name", "not the place of the cache"
    assert [(q["repo_id"], q["revision"]) for q in asked] == [
        ("org/name", "v1"),
        ("org/name", "v2"),
        ("org/name", None),
        ("org/name", "v3"),
    ]


def test_only_files_that_are_read_are_asked_for(asked: list[dict[str, Any]]) -> None:
    from_pretrained("org/name")
    (question,) = asked
    assert set(question) == {"repo_id", "revision", "allow_patterns"}  # token, endpoint and cache are the hub's own
    taken = {
        name: any(fnmatch(name, pattern) for pattern in question["allow_patterns"])
        for name in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "tokenizer.model",
            "chat_template.jinja",
            "additional_chat_templates/rag.jinja",
        ]
    }
    assert all(taken.values()), taken
    for name in [
        "pytorch_model.bin",
        "adapter_model.bin",
        "model.pt",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "modeling_x.py",
        "onnx/model.onnx",
        "README.md",
        "training_args.bin",
    ]:
        assert not any(fnmatch(name, pattern) for pattern in question["allow_patterns"]), name


def test_a_revision_belongs_to_a_name_of_the_hub(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    for load in (from_pretrained, stellarbyte_jax.load_run):
        with pytest.raises(ValueError, match=r"^revision 'v1' is of a name of the Hugging Face hub, and .* is a local"):
            load(str(tmp_path / "snapshot"), revision="v1")
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^revision 'v1' is of a name of the Hugging Face hub, and .* is a run$"):
        stellarbyte_jax.load_run(str(tmp_path / "run"), revision="v1")


def test_offline_with_an_empty_cache(tmp_path: Path, folder: Path) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(ValueError) as caught:
        from_pretrained("org/name", revision="v1")
    assert str(caught.value) == (
        f"org/name at revision v1: there is no such directory here (looked from {folder}), and the hub's cache "
        f"{tmp_path / 'hub'} lacks it, and HF_HUB_OFFLINE forbids asking: fetch it where there is a network, or unset "
        "HF_HUB_OFFLINE"
    )


def test_offline_with_a_cache_that_has_the_model(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as huggingface_hub lays it out: references, and a snapshot of links to blobs."""
    stored = tmp_path / "hub" / "models--org--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tmp_path / "snapshot", stored / "blobs")
    snapshot = stored / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for blob in (stored / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    real = huggingface_hub._snapshot_download.snapshot_download
    found = Path(real("org/name", allow_patterns=["*.json"], cache_dir=tmp_path / "hub"))
    assert found == snapshot
    monkeypatch.setattr(huggingface_hub, "snapshot_download", real)
    assert local_directory("org/name") == local_directory("org/name", "main") == snapshot
    assert load_tokenizer(local_directory("org/name", weights=False)).encode("y") == [3]
    assert_same_tree(from_pretrained("org/name")[1], WEIGHTS)
    (snapshot / "model.safetensors").unlink()  # as where a tokenizer alone was fetched
    assert load_tokenizer(local_directory("org/name", weights=False)).encode("y") == [3]
    with pytest.raises(
        ValueError, match=r"^org/name: there is no such directory here .* HF_HUB_OFFLINE forbids asking"
    ):
        from_pretrained("org/name")


def test_a_failure_of_the_hub_is_one_line_with_what_was_tried(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuses(*_: Any, **__: Any) -> str:
        raise OSError("401 Client Error.\n\nRepository Not Found for url: ...")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuses)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    with pytest.raises(ValueError) as caught:
        from_pretrained("org/name")
    assert str(caught.value) == (
        f"org/name: there is no such directory here (looked from {folder}), and https://hub.example did not give it "
        "(OSError: 401 Client Error.): mend the name, set HF_TOKEN for a private or gated model, or check the "
        "network"
    )


def adapted() -> tuple[ByteTransformer, Params]:
    """A network with adapters, and such ones that change nothing."""
    network = ByteTransformer(dataclasses.replace(MODEL.config, lora={"r": 1, "target_modules": ("q",)}))
    return network, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), split(param_shapes(network))[0])


def test_adapters_name_a_base_of_the_hub_and_its_revision(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    network, adapters = adapted()
    save_adapter(tmp_path / "a", network, adapters, base="org/name", revision="v1", dtype="bfloat16")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", "v1")
    with open(tmp_path / "a" / "adapter_model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"} == {"BF16"}
    AdapterBank.holding(MODEL, WEIGHTS, {"a": tmp_path / "a"})
    assert all("model*.safetensors" not in question["allow_patterns"] for question in asked), "settings are enough"
    read = load_adapter(tmp_path / "a")[1]
    assert_same_tree(jax.tree.map(np.asarray, split(read)[1]), WEIGHTS)
    assert {(question["repo_id"], question["revision"]) for question in asked} == {("org/name", "v1")}


def test_the_base_of_adapters_is_fetched_where_it_is_not_here(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    """A run of adapters that is taken to another machine has the name of its base, whose cache is elsewhere there."""
    network, adapters = adapted()
    for name, fetched in (("org/name", True), ("../base", False)):
        run = tmp_path / f"run {fetched}"
        config = TrainConfig(
            output_dir=str(run),
            steps=9,
            init_from=name,
            model=network.config,
            data=DataConfig(sequence_length=16),
            schedule=ScheduleConfig(warmup_steps=0),
        )
        checkpointer = Checkpointer(run, CheckpointConfig())
        of = {"config": config.to_dict(), BASE: identity("/no/such", WEIGHTS)}
        checkpointer.save(3, {"params": adapters}, of, frozen=[])
        checkpointer.close()
        if fetched:
            assert_same_tree(jax.tree.map(np.asarray, find_source(run).weights()[1]), WEIGHTS)
            assert [question["repo_id"] for question in asked] == ["org/name"]
        else:
            with pytest.raises(CheckpointError, match="/no/such cannot be read: "):
                find_source(run).weights()

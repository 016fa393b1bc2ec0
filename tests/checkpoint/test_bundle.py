"""A model as it is used, from each kind of directory: its weights, its tokenizer, how its texts begin and end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_models import NEEDS_TORCH, assert_same_tree, random_model, save_words
from safetensors.numpy import load_file, save_file

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.checkpoint.store import TOKENIZER, Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import save_initial
from stellarbyte_jax.config import CheckpointConfig, DataConfig, TrainConfig
from stellarbyte_jax.hf.card import TrainingFacts
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.tokenizer.directory import copy_tokenizer

MODEL, WEIGHTS = random_model(num_hidden_layers=1)
WORDS = ["x", "<b>", "<e>", "y"]
NAMES = {"bos_token": "<b>", "eos_token": "<e>"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as ``hf`` and as ``run``, both with the tokenizer ``words``."""
    base = tmp_path_factory.mktemp("bundles")
    save_words(base / "words", WORDS, **NAMES)
    save_pretrained(base / "hf", MODEL, WEIGHTS, tokenizer=base / "words")
    save_initial(base / "run", MODEL.config, WEIGHTS, str(base / "words"))
    return base


@pytest.fixture
def copies(directories: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(directories, tmp_path / "copies")


@pytest.mark.parametrize("kind", ["hf", "run", "run/checkpoints/0"])
def test_each_kind_of_directory_gives_the_same_model(kind: str, directories: Path) -> None:
    bundle = load_bundle(str(directories / kind))
    assert_same_tree(bundle.params, WEIGHTS)
    assert (bundle.model.config.vocab_size, bundle.model.config.hidden_size) == (96, 32)
    assert bundle.tokenizer.encode("y") == [3]
    assert (bundle.tokenizer.bos_id, bundle.tokenizer.eos_id, bundle.stop_ids) == (1, 2, [2])


def test_a_step_is_the_named_one_or_that_of_the_path(tmp_path: Path) -> None:
    words = save_words(tmp_path / "words", WORDS, **NAMES)
    config = TrainConfig(
        output_dir="run",
        steps=200,
        model=MODEL.config,
        data=DataConfig(sequence_length=16, tokenizer=str(words), add_bos=False),
    )
    checkpointer = Checkpointer(tmp_path / "run", CheckpointConfig(keep_latest=9))
    for step in (3, 20):
        arrays = {"params": WEIGHTS | {"final_norm": {"scale": WEIGHTS["final_norm"]["scale"] * 0 + step}}}
        checkpointer.save(step, arrays, {"config": config.to_dict()}, frozen=[])
    checkpointer.close()

    def found(path: Path, step: int | None = None) -> float:
        bundle = load_bundle(path, step)
        assert not bundle.add_bos
        return float(bundle.params["final_norm"]["scale"][0])

    run = tmp_path / "run"
    assert (found(run), found(run, 3), found(run / "checkpoints" / "3")) == (20, 3, 3)
    assert found(run / "checkpoints" / "3", 20) == 20
    with pytest.raises(CheckpointError, match=r"run has no checkpoint of step 7; there are 3, 20$"):
        load_bundle(run / "checkpoints" / "7")


def test_the_runs_own_tokenizer_goes_before_that_of_its_settings(copies: Path) -> None:
    save_words(copies / "run" / TOKENIZER, ["x", "<e>"], eos_token="<e>")
    bundle = load_bundle(copies / "run")
    assert bundle.tokenizer.path == str(copies / "run" / "tokenizer")
    assert (bundle.tokenizer.vocab_size, bundle.tokenizer.bos_id, bundle.stop_ids) == (2, None, [1])


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_every_end_of_a_text_is_known(kind: str, copies: Path) -> None:
    directory = copies / ("hf" if kind == "hf" else "words")
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 99, 2, -1]}')  # two have no row
    if kind == "run":
        shutil.copytree(copies / "words", copies / "run" / TOKENIZER)
    assert load_bundle(copies / kind).stop_ids == [2, 3]


def test_whether_texts_begin_with_bos(copies: Path) -> None:
    assert load_bundle(copies / "run").add_bos  # the default of training
    assert not load_bundle(copies / "hf").add_bos
    file = copies / "hf" / "tokenizer.json"
    library = json.loads(file.read_text())
    bos = load_bundle(copies / "hf").tokenizer
    library["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<b>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<b>": {"id": "<b>", "ids": [bos.bos_id], "tokens": ["<b>"]}},
    }
    file.write_text(json.dumps(library))
    assert load_bundle(copies / "hf").add_bos


def test_an_eos_after_texts_is_told(copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = copies / "hf" / "tokenizer.json"
    library = json.loads(file.read_text())
    assert load_bundle(copies / "hf").tokenizer.eos_id is not None and "adds eos" not in caplog.text
    library["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<e>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<e>": {"id": "<e>", "ids": [load_bundle(copies / "hf").tokenizer.eos_id], "tokens": ["<e>"]}
        },
    }
    file.write_text(json.dumps(library))
    load_bundle(copies / "hf")
    assert "adds eos after a text" in caplog.text


def test_a_step_of_a_converted_model(directories: Path) -> None:
    message = rf"^a step belongs to a run directory; {directories / 'hf'} is a Hugging Face directory$"
    with pytest.raises(ValueError, match=message):
        load_bundle(directories / "hf", 0)


def test_directories_of_neither_kind(tmp_path: Path) -> None:
    message = (
        rf"^{tmp_path} is neither a Hugging Face directory \(config\.json\) nor a run directory \(checkpoints/\): "
        "give the output_dir of a run, or a converted model$"
    )
    with pytest.raises(ValueError, match=message):
        load_bundle(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/nowhere does not exist: give a local directory, or a name of"):
        load_bundle(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_a_model_without_its_tokenizer(kind: str, copies: Path) -> None:
    (copies / "hf" / "tokenizer.json").unlink()
    (copies / "run" / TOKENIZER).mkdir()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_bundle(copies / kind)


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_a_tokenizer_larger_than_the_model(kind: str, copies: Path) -> None:
    for directory in (copies / "hf", copies / "run" / TOKENIZER):
        save_words(directory, [f"w{i}" for i in range(97)])
    with pytest.raises(
        ValueError, match=r"has 97 tokens, model\.vocab_size is 96: give a new model model\.vocab_size=97"
    ):
        load_bundle(copies / kind)


def trained(run: Path, step: int, init_from: str | None = None, **data: Any) -> None:
    """Gives a run a checkpoint of weights that were trained in it."""
    settings = DataConfig(train=("a.jsonl",), sequence_length=16, tokenizer=str(run.parent / "words"), **data)
    config = TrainConfig(output_dir="run", steps=200, model=MODEL.config, data=settings, init_from=init_from)
    checkpointer = Checkpointer(run, CheckpointConfig(keep_latest=9))
    checkpointer.save(step, {"params": WEIGHTS}, {"config": config.to_dict()}, frozen=[])
    checkpointer.close()


def test_what_is_known_of_a_training_on_plain_text(copies: Path) -> None:
    run = copies / "run"
    assert not any(load_bundle(path).plain_text for path in (run, copies / "hf"))  # foreign weights
    trained(run, 20)
    assert load_bundle(run).plain_text and not load_bundle(run, 0).plain_text
    trained(run, 30, template="Question: {q} Answer: {a}")
    assert not load_bundle(run).plain_text
    trained(run, 25, init_from="a/chat-model")  # which may have been trained on conversations
    assert not load_bundle(run, 25).plain_text


@pytest.mark.parametrize("size", [5 * 10**9, 4096])
def test_an_export_says_itself_what_it_was_trained_on(size: int, directories: Path, tmp_path: Path) -> None:
    facts = TrainingFacts(steps=3, tokens=9, optimizer="adamw", plain_text=True)
    words, export = directories / "words", tmp_path / "hf"
    save_pretrained(export, MODEL, WEIGHTS, tokenizer=words, training=facts, max_shard_bytes=size)
    assert (len(list(export.glob("*.safetensors"))) > 1) == (size == 4096)
    moved = export.rename(tmp_path / "elsewhere")
    assert load_bundle(moved).plain_text
    assert "trained" not in (moved / "config.json").read_text()  # which outlives training by other programs
    other = replace(facts, plain_text=False)
    save_pretrained(export, MODEL, WEIGHTS, tokenizer=words, training=other)
    assert not load_bundle(export).plain_text
    file = min(moved.glob("*.safetensors"))
    for metadata in ({"format": "pt"}, None):  # as other programs write one
        save_file(load_file(file), file, metadata=metadata)
        assert not load_bundle(moved).plain_text


def test_weights_that_transformers_wrote_anew_say_nothing(directories: Path, tmp_path: Path) -> None:
    """It may have trained them on conversations."""
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoModelForCausalLM

    facts = TrainingFacts(steps=3, tokens=9, optimizer="adamw", plain_text=True)
    save_pretrained(tmp_path / "hf", MODEL, WEIGHTS, tokenizer=directories / "words", training=facts)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "chat")
    copy_tokenizer(directories / "words", tmp_path / "chat")
    assert load_bundle(tmp_path / "hf").plain_text and not load_bundle(tmp_path / "chat").plain_text

"""The command convert: checkpoints to Hugging Face and back, what it prints, and its errors."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.hf_models import edit_config, random_model, save_words
from safetensors import safe_open
from tokenizers import Tokenizer, models, processors
from transformers import GenerationConfig

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.cli import convert as script
from stellarbyte_jax.cli.convert import text_rows
from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.files import shipped
from stellarbyte_jax.hf.card import TrainingFacts
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.lazy import as_numpy
from stellarbyte_jax.tokenizer.codec import load_tokenizer

SMALL = ByteConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
)
NEEDS_TORCH = "--verify compares with transformers on torch: pip install -e '.[torch]'"


@pytest.fixture
def convert() -> Callable[..., int]:
    def run(*arguments: Any) -> int:
        return script.main([*map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape, "f4"), param_shapes(ByteTransformer(SMALL)))


@pytest.fixture
def run_dir(tmp_path: Path, params: dict[str, Any]) -> Path:
    tokenizer = tmp_path / "words"
    tokenizer.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="a")).save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    save_initial(tmp_path / "run", SMALL, params, str(tokenizer))
    return tmp_path / "run"


def assert_same(left: Any, right: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def test_to_hf_and_back(
    convert: Callable[..., int], run_dir: Path, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    hf, again = run_dir.parent / "hf", run_dir.parent / "again"
    assert convert("to-hf", run_dir, hf, "--max-shard-size", "4KB") == 0
    printed = capsys.readouterr().out
    assert "model.safetensors.index.json" in printed
    assert f"wrote {hf}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters" in printed
    assert json.loads((hf / "config.json").read_text())["eos_token_id"] == 1
    assert (hf / "tokenizer.json").is_file()
    card = (hf / "README.md").read_text(encoding="utf-8")
    assert "AutoTokenizer" in card and "Training" not in card  # nothing is known of it

    assert convert("from-hf", hf, again) == 0
    config, back = load_weights(again)
    assert_same(back, params)
    assert config.model.to_dict() == SMALL.to_dict() | {"num_key_value_heads": 2, "initializer_range": 0.02}
    assert config.data.tokenizer == str(again / "tokenizer")

    # The name of one checkpoint will do, and its tokenizer is found beside it.
    assert convert("to-hf", again / "checkpoints" / "0", run_dir.parent / "hf2", "--dtype", "bf16") == 0
    assert (run_dir.parent / "hf2" / "tokenizer_config.json").is_file()
    with safe_open(run_dir.parent / "hf2" / "model.safetensors", framework="np") as handle:
        assert handle.get_tensor("lm_head.weight").dtype == "bfloat16"


def test_what_a_gguf_file_would_lack_is_told(
    convert: Callable[..., int], run_dir: Path, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("to-hf", run_dir, run_dir.parent / "hf") == 0
    assert "GGUF" not in capsys.readouterr().out
    windowed = ByteConfig(**(SMALL.to_dict() | {"sliding_window": 8}))
    save_initial(run_dir.parent / "windowed", windowed, params, str(run_dir.parent / "words"))
    assert convert("to-hf", run_dir.parent / "windowed", run_dir.parent / "hf2") == 0
    told = "a GGUF file of it would lack sliding_window 8 (every token sees the whole text): see docs/gguf.md\n"
    assert capsys.readouterr().out.endswith(told)


def test_an_export_of_a_run_whose_tokenizer_is_gone_says_so(
    convert: Callable[..., int], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_dir.parent / "words")
    assert convert("to-hf", run_dir, run_dir.parent / "hf") == 0
    told = "tokenizer: none found, so the export has none; give --tokenizer DIR to add one\n"
    assert capsys.readouterr().out.startswith(told)
    assert "AutoTokenizer" not in (run_dir.parent / "hf" / "README.md").read_text(encoding="utf-8")


def test_what_lies_beside_is_not_the_tokenizer_of_a_model_that_has_none(
    convert: Callable[..., int],
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as the tokenizer of this project, which has the vocabulary of many."""
    monkeypatch.chdir(tmp_path)
    save_words(tmp_path / "tokenizer", ["a", "b", "<e>"], eos_token="<e>")
    assert convert("from-hf", bare, "alone") == 0
    assert "tokenizer: none that is whole, so what reads texts asks for one" in capsys.readouterr().out
    assert convert("to-hf", "alone", "again") == 0
    assert not Path("again/tokenizer.json").exists()
    with pytest.raises(ValueError, match=r"alone/tokenizer holds no tokenizer\.json"):
        load_bundle("alone")


def test_weights_are_converted_without_what_cannot_be_told_of_their_training(
    convert: Callable[..., int], run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def facts(run: Path, step: int | None) -> TrainingFacts:
        if step is None:
            raise CheckpointError("data of it is damaged")
        return TrainingFacts(step + 30, 4096, "lion", 1.25)

    monkeypatch.setattr(script, "load_training_facts", facts)
    assert convert("to-hf", run_dir, run_dir.parent / "a") == 0
    assert "the model card tells nothing of the training: data of it is damaged" in capsys.readouterr().out
    assert "Training" not in (run_dir.parent / "a" / "README.md").read_text()
    assert convert("to-hf", run_dir / "checkpoints" / "0", run_dir.parent / "b") == 0
    assert "| steps | 30 |" in (run_dir.parent / "b" / "README.md").read_text()


def test_ends_and_beginnings_of_texts_go_both_ways(convert: Callable[..., int], run_dir: Path) -> None:
    """Ends are named by the tokenizer and by the settings: each of them ends a text after either conversion."""
    hf, run, again = (run_dir.parent / name for name in ("hf", "again", "hf2"))
    assert convert("to-hf", run_dir, hf) == 0
    for file, ends in (("config.json", [2, 3]), ("generation_config.json", [3, 4])):
        values = json.loads((hf / file).read_text())
        (hf / file).write_text(json.dumps(values | {"eos_token_id": ends}))
    expected = load_bundle(hf)
    assert expected.stop_ids[0] == 1 and set(expected.stop_ids) == {1, 2, 3, 4} and not expected.add_bos
    assert convert("from-hf", hf, run) == 0
    assert convert("to-hf", run, again) == 0
    for directory in (run, again):
        bundle = load_bundle(directory)
        assert (bundle.stop_ids, bundle.add_bos) == (expected.stop_ids, expected.add_bos)
    assert GenerationConfig.from_pretrained(again).eos_token_id == [3, 4, 2]


def test_an_eos_that_the_tokenizer_adds_to_texts_is_told(
    convert: Callable[..., int], run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = run_dir.parent / "hf"
    assert convert("to-hf", run_dir, hf) == 0
    assert convert("from-hf", hf, run_dir.parent / "plain") == 0 and "adds eos" not in caplog.text
    library = Tokenizer.from_file(str(hf / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(single="$A <e>", special_tokens=[("<e>", 1)])
    library.save(str(hf / "tokenizer.json"))
    assert convert("from-hf", hf, run_dir.parent / "again") == 0
    assert "adds eos after a text" in caplog.text


@pytest.fixture
def bare(convert: Callable[..., int], run_dir: Path) -> Path:
    """A Hugging Face directory without a tokenizer.json, whose config.json names ends of texts."""
    hf = run_dir.parent / "bare"
    assert convert("to-hf", run_dir, hf) == 0
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (hf / file).unlink()
    edit_config(hf, bos_token_id=5, eos_token_id=[1, 2], pad_token_id=0)
    return hf


@pytest.mark.parametrize("generation", [None, {"eos_token_id": [2, 3], "temperature": 0.5}], ids=["config", "both"])
@pytest.mark.parametrize("model", [None, b"\x00sentencepiece"], ids=["nothing", "tokenizer.model"])
def test_ends_of_texts_go_both_ways_without_a_tokenizer(
    generation: dict[str, Any] | None, model: bytes | None, convert: Callable[..., int], bare: Path
) -> None:
    run, again = bare.parent / "again", bare.parent / "hf2"
    if generation is not None:
        (bare / "generation_config.json").write_text(json.dumps(generation))
    if model is not None:
        (bare / "tokenizer.model").write_bytes(model)
    assert convert("from-hf", bare, run) == 0
    assert convert("to-hf", run, again) == 0
    expected = {"bos_token_id": 5, "eos_token_id": [1, 2] if generation is None else [2, 3, 1], "pad_token_id": 0}
    assert expected.items() <= json.loads((again / "config.json").read_text()).items()
    assert json.loads((again / "generation_config.json").read_text()) == (generation or {}) | expected
    assert GenerationConfig.from_pretrained(again).eos_token_id == expected["eos_token_id"]
    assert (again / "tokenizer.model").exists() == (model is not None)
    if model is not None:
        assert (again / "tokenizer.model").read_bytes() == model
    with pytest.raises(ValueError, match=r"tokenizer holds no tokenizer\.json"):
        load_bundle(run)  # and not the tokenizer of some other model


def test_ends_of_texts_go_with_a_tokenizer_that_is_given_later(
    convert: Callable[..., int], bare: Path, run_dir: Path
) -> None:
    """It names one of its own, which is an end too; what it states about the model goes before."""
    run, words = bare.parent / "again", run_dir.parent / "words"
    assert convert("from-hf", bare, run) == 0
    assert convert("to-hf", run, bare.parent / "hf2", "--tokenizer", words) == 0
    for file in ("config.json", "generation_config.json"):
        assert json.loads((bare.parent / "hf2" / file).read_text())["eos_token_id"] == [1, 2]
    assert load_bundle(bare.parent / "hf2").stop_ids == [1, 2]
    (words / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert convert("to-hf", run, bare.parent / "hf3", "--tokenizer", words) == 0
    assert json.loads((bare.parent / "hf3" / "config.json").read_text())["eos_token_id"] == [1, 7]


def test_ends_of_texts_go_into_a_resized_vocabulary(
    convert: Callable[..., int], bare: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = bare.parent / "resized", run_dir.parent / "words"
    edit_config(bare, eos_token_id=1)  # what the tokenizer says too
    assert convert("resize", bare, bare.parent / "same", "--tokenizer", words) == 0
    assert "no longer any" not in capsys.readouterr().out
    edit_config(bare, eos_token_id=[3, 2, 39])
    assert convert("resize", bare, run, "--tokenizer", words) == 0
    assert load_bundle(run).stop_ids == [1, 3, 2, 39]
    assert "no longer any" not in capsys.readouterr().out
    # A run knows them too; an id without a row is none.
    assert convert("resize", run, bare.parent / "smaller", "--tokenizer", words, "--vocab-size", 30) == 0
    assert load_bundle(bare.parent / "smaller").stop_ids == [1, 3, 2]
    assert "ends of texts: [39] of " in capsys.readouterr().out
    # Where both spell their tokens, those that another tokenizer spells otherwise are none.
    other = save_words(bare.parent / "other", ["a", "<e>", "x", "y"], eos_token="<e>")
    hf = save_words(bare, ["a", "b", "x", "z"])
    assert convert("resize", hf, bare.parent / "another", "--tokenizer", other) == 0
    assert load_bundle(bare.parent / "another").stop_ids == [1, 2, 39]  # neither has 39
    assert "ends of texts: [3] of " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_agrees(
    dtype: str, convert: Callable[..., int], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    hf = run_dir.parent / "hf"
    assert convert("to-hf", run_dir, hf, "--dtype", dtype, "--verify") == 0
    printed = capsys.readouterr().out
    assert "agrees with transformers" in printed and "comparing with transformers on random tokens" in printed
    if dtype == "float32":
        assert convert("from-hf", hf, run_dir.parent / "again", "--verify") == 0
        assert "agrees with transformers" in capsys.readouterr().out


def test_verify_reads_texts_where_there_is_a_tokenizer(
    convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of both languages of the embedded corpus; the family is the one that was asked for."""
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    tokenizer = load_tokenizer(shipped("tokenizer"))
    model, params = random_model(vocab_size=tokenizer.vocab_size)
    save_initial(tmp_path / "run", model.config, params, str(shipped("tokenizer")))
    arguments = ("to-hf", tmp_path / "run", tmp_path / "hf", "--verify", "--family", "stellarbyte", "--tokenizer")
    assert convert(*arguments, shipped("tokenizer")) == 0
    printed = capsys.readouterr().out
    assert "comparing with transformers on texts of the embedded corpus" in printed
    assert re.search(r"verify: \d{3} tokens: .*, in bfloat16 on \d+\.\d+%: agrees", printed)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "stellarbyte"
    rows_BT = text_rows(tokenizer, 24)
    assert rows_BT is not None and rows_BT.shape == (rows_BT.shape[0], 24) and rows_BT.shape[0] >= 8
    texts = [tokenizer.decode(row) for row in rows_BT]
    assert any(text.isascii() for text in texts) and any("。" in text or "，" in text for text in texts)
    assert convert("to-hf", tmp_path / "run", tmp_path / "other", "--family", "gpt2") == 1
    assert "there is no family 'gpt2': known are llama, mistral" in capsys.readouterr().err


def test_verify_notices_other_weights(
    convert: Callable[..., int],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    from stellarbyte_jax.hf import directory

    saved = directory.cast
    monkeypatch.setattr(directory, "cast", lambda a, d, name: saved(a * 2 if "up_proj" in name else a, d, name))
    assert convert("to-hf", run_dir, run_dir.parent / "hf", "--verify") == 1
    assert "DOES NOT AGREE" in capsys.readouterr().out


def test_texts_that_are_compared_are_within_the_trained_length(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(script, "compare_with_transformers", lambda *given: seen.append(given[-1]))
    model = ByteTransformer(dataclasses.replace(SMALL, max_position_embeddings=6))
    script.compare(shipped("tokenizer"), model, {})
    script.compare(bare, model, {})
    assert seen[0].shape[1] == 6 and seen[1] is None


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(
    convert: Callable[..., int], bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_words(bare, [f"w{i}" for i in range(41)], eos_token="w1")
    assert convert("from-hf", bare, bare.parent / "again") == 1
    assert "41 tokens" in capsys.readouterr().err and not (bare.parent / "again").exists()


def test_verify_reads_the_run_that_was_written(
    convert: Callable[..., int], run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    hf, write = run_dir.parent / "hf", script.write_run
    assert convert("to-hf", run_dir, hf) == 0
    monkeypatch.setattr(
        script,
        "write_run",
        lambda run, config, params, *rest: write(
            run, config, params | {"embed": jax.tree.map(lambda x: as_numpy(x) * 2, params["embed"])}, *rest
        ),
    )
    assert convert("from-hf", hf, run_dir.parent / "again", "--verify") == 1
    assert "DOES NOT AGREE" in capsys.readouterr().out


def test_verify_without_torch_says_what_to_install(
    convert: Callable[..., int],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert("to-hf", run_dir, run_dir.parent / "hf", "--verify") == 1
    assert "needs torch: pip install torch" in capsys.readouterr().err
    assert not (run_dir.parent / "hf").exists()


def test_existing_directories(
    convert: Callable[..., int], run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hf, again = tmp_path / "hf", tmp_path / "again"
    assert convert("to-hf", run_dir, hf) == 0
    assert convert("to-hf", run_dir, hf) == 1
    assert capsys.readouterr().err.endswith("is not empty: give another directory, or add --overwrite\n")
    assert convert("to-hf", run_dir, hf, "--overwrite") == 0
    assert convert("from-hf", hf, again) == 0
    assert convert("from-hf", hf, again) == 1
    assert "is not empty: give another directory, or --overwrite" in capsys.readouterr().err
    assert convert("from-hf", hf, again, "--overwrite") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").touch()
    assert convert("from-hf", hf, tmp_path / "other", "--overwrite") == 1
    assert "is no run" in capsys.readouterr().err


def test_bad_input_is_one_line(
    convert: Callable[..., int], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    assert convert("to-hf", run_dir, damaged) == 0
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    larger = save_words(tmp_path / "larger", ["<e>", *(f"w{i}" for i in range(40))])
    assert convert("to-hf", run_dir, tmp_path / "outgrown") == 0
    shutil.copy(larger / "tokenizer.json", tmp_path / "outgrown")
    capsys.readouterr()
    cases = [
        (("to-hf", tmp_path / "nowhere", tmp_path / "hf"), "nowhere holds no checkpoint"),
        (("to-hf", run_dir, tmp_path / "hf", "--step", 7), "has no checkpoint of step 7; there are 0"),
        (("to-hf", run_dir, tmp_path / "hf", "--tokenizer", tmp_path), "holds no tokenizer.json"),
        (("from-hf", tmp_path / "nowhere", tmp_path / "new"), "nowhere does not exist: give a local directory"),
        (("from-hf", run_dir, tmp_path / "new"), "is a run directory, not a Hugging Face directory"),
        (("from-hf", damaged, tmp_path / "new"), "differs from its checksum: the file is damaged. Copy it or export"),
        (("from-hf", tmp_path / "outgrown", tmp_path / "new"), "outgrown has 41 tokens, model.vocab_size is 40: give "),
        (("to-hf", run_dir, tmp_path / "new", "--tokenizer", larger), "larger has 41 tokens, model.vocab_size is 40: "),
    ]
    for arguments, message in cases:
        assert convert(*arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_sizes() -> None:
    assert [script.size(t) for t in ("5GB", "500MiB", "1.5kb", "12")] == [5 * 10**9, 500 * 2**20, 1500, 12]
    assert script.parse(["to-hf", "run", "hf"]).max_shard_size == script.size("5GB")
    for text in ("five", "0GB", "5XB", "-1"):
        with pytest.raises(script.argparse.ArgumentTypeError, match="is no size"):
            script.size(text)

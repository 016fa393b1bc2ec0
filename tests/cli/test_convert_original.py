"""The command convert from-original: a run that trains, generates and exports on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import assert_same_tree, save_words, tensors
from helpers.original_models import DECEMBER, SEED, december_state, saved, saved_config, seed_state

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.cli import convert as script
from stellarbyte_jax.hf.original import from_original

NEEDS_TORCH = "checkpoints of the original are torch's: pip install -e '.[torch]'"
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(20))]


@pytest.fixture
def convert() -> Callable[..., int]:
    return lambda *arguments: script.main(["from-original", *map(str, arguments)])


def test_a_run_of_a_checkpoint(
    convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    checkpoint, run, words = tmp_path / "x.pth", tmp_path / "run", tmp_path / "words"
    torch.save({"model_state": {f"_orig_mod.{n}": torch.tensor(t) for n, t in seed_state().items()}}, checkpoint)
    config = saved_config(tmp_path / "c.json", **SEED, use_cache=True)
    save_words(words, WORDS, bos_token="<s>", eos_token="</s>")
    assert convert(checkpoint, run, "--config", config, "--tokenizer", words, "--layout", "seed") == 0
    printed = capsys.readouterr().out
    assert "layout: seed; texts begin with bos\n" in printed and f"tokenizer: {words}\n" in printed
    assert f"wrote {run}: 7,998 parameters" in printed
    assert [r.message for r in caplog.records] == [f"{config}: without effect on the network here: use_cache"]
    found = from_original(checkpoint, config=config)
    settings, params = load_weights(run)
    assert_same_tree(params, found.params)
    assert settings.model == found.model.config
    assert settings.data.tokenizer == str(run / "tokenizer") and settings.data.add_bos
    assert settings.init_from == str(checkpoint)

    assert convert(checkpoint, run) == 1
    assert "is not empty: give another directory, or --overwrite" in capsys.readouterr().err
    assert convert(checkpoint, run, "--overwrite") == 0
    assert "tokenizer: none, so what reads texts asks for one" in capsys.readouterr().out
    assert not (run / "tokenizer").exists()


def test_december_goes_on_as_llama(convert: Callable[..., int], tmp_path: Path) -> None:
    """Its export is an ordinary Llama, with the tensors of the original under the same names."""
    state = december_state()
    run, hf, words = tmp_path / "run", tmp_path / "hf", tmp_path / "words"
    save_words(words, WORDS, eos_token="</s>")
    assert convert(saved(tmp_path / "x.safetensors", state), run, "--tokenizer", words) == 0
    assert not load_weights(run)[0].data.add_bos
    assert script.main(["to-hf", str(run), str(hf)]) == 0
    assert json.loads((hf / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    written = tensors(hf)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(written[name], tensor)


@pytest.mark.parametrize("bos", [True, False])
def test_texts_begin_with_bos_where_the_tokenizer_has_one(
    bos: bool, convert: Callable[..., int], tmp_path: Path
) -> None:
    save_words(tmp_path / "words", WORDS, **({"bos_token": "<s>"} if bos else {}), eos_token="</s>")
    checkpoint = saved(tmp_path / "x.safetensors", seed_state())
    assert convert(checkpoint, tmp_path / "run", "--tokenizer", tmp_path / "words") == 0
    assert load_weights(tmp_path / "run")[0].data.add_bos == bos


def larger_tokenizer(path: Path) -> list[Any]:
    save_words(path / "words", [*WORDS, *(f"v{i}" for i in range(20))], eos_token="</s>")
    return [saved(path / "x.safetensors", seed_state()), path / "run", "--tokenizer", path / "words"]


def another_layout(path: Path) -> list[Any]:
    return [saved(path / "x.safetensors", seed_state()), path / "run", "--layout", "december"]


def without_torch(path: Path) -> list[Any]:
    (path / "x.pth").write_bytes(b"")
    return [path / "x.pth", path / "run"]


def refused_settings(path: Path) -> list[Any]:
    checkpoint = saved(path / "x.safetensors", december_state())
    config = saved_config(path / "c.json", **DECEMBER, use_moe=True, zzz=3)
    return [checkpoint, path / "run", "--config", config]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (larger_tokenizer, "43 tokens"),
        (another_layout, "has the layout seed, not december: ask for auto"),
        (without_torch, "needs torch: pip install torch, or give a safetensors file"),
        (refused_settings, "this network has no mixture of experts, so such a model cannot be imported; zzz: "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    make: Callable[[Path], list[Any]],
    message: str,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert(*make(tmp_path)) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert not (tmp_path / "run").exists()

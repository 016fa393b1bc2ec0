"""A real pretrained model against transformers: logits on real text, greedy tokens, and a lossless round trip."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.smollm2 import smollm2
from safetensors import safe_open
from tokenizers import Tokenizer

from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.verify import compare_with_transformers
from stellarbyte_jax.inference.api import generate
from stellarbyte_jax.model.decoder import ByteTransformer

pytestmark = pytest.mark.slow
VALIDATION = Path(__file__).parents[2] / "data" / "tiny_bilingual_valid.jsonl"


@pytest.fixture(scope="module")
def directory() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[ByteTransformer, dict[str, Any]]:
    return from_pretrained(directory, compute_dtype="float32")


@pytest.fixture(scope="module")
def text_tokens(directory: Path) -> np.ndarray:
    """Real English text, 4 rows of 320 tokens."""
    documents = [json.loads(line) for line in VALIDATION.read_text(encoding="utf-8").splitlines()]
    english = "\n".join(d["text"] for d in documents if d["lang"] == "en")
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(english).ids
    assert len(ids) >= 4 * 320
    return np.asarray(ids[: 4 * 320], np.int32).reshape(4, 320)


def test_logits_on_real_text(
    directory: Path, loaded: tuple[ByteTransformer, dict[str, Any]], text_tokens: np.ndarray
) -> None:
    agreement = compare_with_transformers(directory, *loaded, text_tokens)
    print(f"SmolLM2-135M-Instruct: {agreement}")
    assert agreement.tokens == 1280
    assert agreement.largest_logit > 5
    assert agreement.max_difference < 1e-3
    assert agreement.argmax_agreement > 0.999


def test_greedy_tokens(
    directory: Path, loaded: tuple[ByteTransformer, dict[str, Any]], text_tokens: np.ndarray
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompt = text_tokens[0, :32]
    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.from_numpy(prompt[None].astype(np.int64))
    theirs = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    ours = generate(*loaded, prompt, max_new_tokens=64)
    assert ours.sequences[0] == theirs[0, len(prompt) :].tolist()
    assert len(set(ours.sequences[0])) > 10  # text, not one token over and over


def test_there_and_back_is_bit_equal(
    directory: Path, loaded: tuple[ByteTransformer, dict[str, Any]], tmp_path: Path
) -> None:
    save_pretrained(tmp_path / "back", *loaded, max_shard_bytes=200_000_000, tokenizer=directory)
    before, after = dict(_tensors(directory)), {}
    for name, tensor in _tensors(tmp_path / "back"):
        assert before[name].dtype == tensor.dtype
        np.testing.assert_array_equal(before[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)
        after[name] = True
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert [config[f"{t}_token_id"] for t in ("bos", "eos", "pad")] == [1, 2, 2]


def _tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():
                yield name, handle.get_tensor(name)

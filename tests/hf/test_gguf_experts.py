"""Exports of Qwen3 with experts on their way to GGUF, which takes a tokenizer that llama.cpp is told the rule of."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import gguf_files
from helpers.hf_experts import our_model
from helpers.hf_models import small_config
from helpers.variants import run

from stellarbyte_jax.config import RopeScaling
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.hf.gguf import dropped_by_llama_cpp

ROOT = Path(__file__).parents[2]
LLAMA3 = RopeScaling(
    name="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
MODEL: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
SAME = {"norm_topk_prob": True, "mlp_only_layers": ()}
DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "norm": (
        {"moe": SAME | {"norm_topk_prob": False}},
        "moe.norm_topk_prob False (the weights of a token's experts add up to one)",
    ),
    "llama3": ({"moe": SAME, "rope_scaling": LLAMA3}, "rope_scaling llama3 (none)"),
}
TOKENS = np.random.default_rng(3).integers(3, 2500, (1, 100), dtype=np.int32)


def converted(place: Path, **settings: Any) -> Any:
    """A model, its weights, its GGUF file, and what the program of the document said last while it made that."""
    text = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8")
    [program] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "get_vocab_base_pre" in b]
    (gguf_files.converter() / "to_gguf.py").write_text(program, encoding="utf-8")
    model, params = our_model("qwen3_moe", **MODEL, **settings)
    save_pretrained(place / "hf", model, params, tokenizer=ROOT / "tokenizer")
    last = gguf_files.convert(place / "hf", place / "f32.gguf", program="to_gguf.py")
    return model, params, place / "f32.gguf", last


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_is_named(name: str) -> None:
    experts = {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24}
    settings, told = DROPPED[name]
    config = small_config(**{**MODEL, "qk_norm": True, **settings, "moe": experts | settings["moe"]})
    assert dropped_by_llama_cpp("qwen3_moe", config) == [told]
    same = small_config(**MODEL, qk_norm=True, moe=experts | SAME)
    assert dropped_by_llama_cpp("qwen3_moe", same) == []


@pytest.mark.slow
def test_the_runtime_computes_the_same(tmp_path: Path) -> None:
    model, params, file, last = converted(tmp_path, moe=SAME)
    assert "successfully exported" in last
    held, found = gguf_files.read(file)
    assert held["general.architecture"] == "qwen3moe"
    counts = ("expert_count", "expert_used_count", "expert_feed_forward_length")
    assert [held[f"qwen3moe.{name}"] for name in counts] == [6, 3, 24]
    ours = params["layers"]["0"]["moe"]
    np.testing.assert_array_equal(found["blk.1.ffn_gate_inp.weight"], ours["router"]["kernel"][1].T)
    for name, part in (("gate", ours["experts"]["gate_up"][..., 0, :]), ("up", ours["experts"]["gate_up"][..., 1, :])):
        np.testing.assert_array_equal(found[f"blk.1.ffn_{name}_exps.weight"], part[1].swapaxes(1, 2))
    np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"], ours["experts"]["down"][1].swapaxes(1, 2))
    gguf_files.require_runtime()
    logits = gguf_files.compute(file, TOKENS[0].tolist())["logits"]
    np.testing.assert_allclose(logits, run(model, params, TOKENS)[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_is_what_the_document_says(name: str, tmp_path: Path) -> None:
    gguf_files.require_runtime()
    model, params, file, _ = converted(tmp_path, **DROPPED[name][0])
    found = gguf_files.compute(file, TOKENS[0].tolist())
    assert np.abs(found["logits"] - run(model, params, TOKENS)[0]).max() > 1e-2


@pytest.mark.slow
def test_layers_without_experts_are_refused_by_the_converter(tmp_path: Path) -> None:
    assert "Can not map tensor 'model.layers.0.mlp." in converted(tmp_path, moe=SAME | {"mlp_only_layers": (0,)})[3]

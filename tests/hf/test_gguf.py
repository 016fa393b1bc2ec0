"""Exports on their way to GGUF: llama.cpp's own converter reads them, and its runtime computes the same.

``docs/gguf.md`` tells what is tested here.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import gguf_files
from helpers.hf_experts import routers_anew
from helpers.hf_models import NEEDS_TORCH, random_model, save_words, small_config, tensors
from helpers.smollm2 import smollm2
from helpers.variants import run
from tokenizers import Tokenizer

from stellarbyte_jax.config import RopeScaling
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.gguf import dropped_by_llama_cpp
from stellarbyte_jax.inference.api import generate
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.ops.rotary.angles import rotary_frequencies

ROOT = Path(__file__).parents[2]
OWN_TOKENIZER = ROOT / "tokenizer"
YARN = RopeScaling(name="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0)
LLAMA3 = RopeScaling(
    name="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
BIASES = {"attention_bias": True, "attention_output_bias": True}
SIZES: dict[str, Any] = {
    "vocab_size": 2500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "rope_theta": 50000.0,
    "rms_norm_eps": 3e-5,
}
# A family and what is set beside SIZES: what llama.cpp computes as we do.
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", BIASES | {"mlp_bias": True}),
    "llama, tied, interleaved, padded": (
        "llama",
        {"tie_word_embeddings": True, "rope_pairing": "interleaved", "vocab_size_multiple": 64},
    ),
    "llama, wide heads, linear": ("llama", {"head_dim": 32, "rope_scaling": RopeScaling(name="linear", factor=4.0)}),
    "llama, yarn": ("llama", {"rope_scaling": YARN}),
    "llama, llama3": ("llama", {"rope_scaling": LLAMA3}),
    "mistral, wide heads": ("mistral", {"head_dim": 32}),
    "mistral, llama3": ("mistral", {"rope_scaling": LLAMA3}),
    "qwen2, tied": ("qwen2", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"attention_bias": True, "rope_scaling": YARN}),
    "qwen3, wide heads": ("qwen3", {"qk_norm": True, "head_dim": 32}),
    "qwen3, linear": ("qwen3", {"qk_norm": True, "rope_scaling": RopeScaling(name="linear", factor=4.0)}),
    "mixtral": ("mixtral", {"moe": {"num_experts": 5}, "rope_scaling": LLAMA3}),
    "phi3": ("phi3", {}),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True}),
}
# What its converter drops without a word.
DROPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "window, mistral": ("mistral", {"sliding_window": 8}),
    "window, phi3": ("phi3", {"sliding_window": 8}),
    "windows, qwen2": (
        "qwen2",
        {"attention_bias": True, "sliding_window": 8, "layer_types": ("full_attention", "sliding_attention")},
    ),
    "windows, qwen3": ("qwen3", {"qk_norm": True, "sliding_window": 8}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "llama3 of qwen2": ("qwen2", {"attention_bias": True, "rope_scaling": LLAMA3}),
    "llama3 of qwen3": ("qwen3", {"qk_norm": True, "rope_scaling": LLAMA3}),
    "window, mixtral": ("mixtral", {"sliding_window": 8, "moe": {"num_experts": 5}}),
}
# Of a GGUF file, and of transformers.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
TOKENS = np.random.default_rng(3).integers(3, 2500, (1, 100), dtype=np.int32)
TEXTS = [json.loads(line)["text"] for line in gguf_files.CORPUS.read_text(encoding="utf-8").splitlines()]


def _model(**settings: Any) -> tuple[ByteTransformer, dict[str, Any]]:
    """Weights around 0: with a common part, as other tests have them, every text is followed by the same token."""
    model, params = random_model(**(SIZES | settings))
    return model, routers_anew(model, jax.tree.map(lambda leaf: leaf - np.float32(0.1), params))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save_pieces(tmp_path_factory.mktemp("tokenizer") / "pieces")


def _export(directory: Path, family: str, settings: dict[str, Any], tokenizer: Path) -> Any:
    model, params = _model(**settings)
    save_pretrained(directory, model, params, family=family, tokenizer=tokenizer)
    return model, params


@pytest.mark.parametrize(("family", "settings"), SAME.values(), ids=SAME)
def test_config_json_has_what_the_converter_reads(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, params = _model(**settings)
    save_pretrained(tmp_path / "hf", model, params, family=family)
    config, written = model.config, json.loads((tmp_path / "hf" / "config.json").read_text())
    architecture = family.title().replace("_", "")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    assert written["architectures"] == [f"{architecture}ForCausalLM"]
    assert [written[name] for name in sizes] == [SIZES[name] for name in sizes]
    assert (written["num_attention_heads"], written["num_key_value_heads"]) == (4, 2)
    assert written.get("head_dim", 16) == config.head_size and written["rms_norm_eps"] == 3e-5
    assert written["tie_word_embeddings"] == settings.get("tie_word_embeddings", False)
    # A reader of transformers 4 knows rope_theta and rope_scaling, one of 5 rope_parameters alone.
    scaling = config.rope_scaling
    kind = "default" if scaling.name == "none" else scaling.name
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 50000
    assert written["rope_parameters"]["rope_type"] == kind
    for table in ("rope_parameters", "rope_scaling") if kind != "default" else ():
        assert (written[table]["rope_type"], written[table]["factor"]) == (kind, scaling.factor)
        if kind != "linear":
            assert written[table]["original_max_position_embeddings"] == 64
    if family == "phi3":  # it must be outside of the table
        assert written["original_max_position_embeddings"] == 256


@pytest.mark.parametrize(("family", "settings"), SAME.values(), ids=SAME)
def test_nothing_is_dropped_of(family: str, settings: dict[str, Any]) -> None:
    assert dropped_by_llama_cpp(family, small_config(**(SIZES | settings))) == []


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_is_named(name: str) -> None:
    family, settings = DROPPED[name]
    [told] = dropped_by_llama_cpp(family, small_config(**(SIZES | settings)))
    assert told.startswith(
        {"w": "sliding_window 8 (", "g": "hidden_act gelu (silu)", "l": "rope_scaling llama3"}[name[0]]
    )


def test_settings_that_only_some_models_lose() -> None:
    def dropped(family: str = "llama", **settings: Any) -> list[str]:
        return dropped_by_llama_cpp(family, small_config(**(SIZES | settings)))

    yarn = {"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    factor = RopeScaling(**yarn, attention_factor=1.3)
    assert dropped(rope_scaling=factor) == ["rope_scaling.attention_factor 1.3 (1.13863)"]
    assert dropped(rope_scaling=RopeScaling(**yarn, attention_factor=0.1 * math.log(4) + 1)) == []
    [told] = dropped(rope_scaling=RopeScaling(name="dynamic", factor=4.0))
    assert told == "rope_scaling dynamic (none: the same up to 256 tokens)"
    assert dropped(sliding_window=256) == []  # no text is longer
    assert dropped("stellarbyte", sliding_window=8) == []  # it is refused by its name


def test_an_export_names_the_tokenizer_as_releases_4_do(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(96)]
    named = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    save_words(tmp_path / "t", words, tokenizer_class="TokenizersBackend", extra_special_tokens=["w3"], **named)
    save_pretrained(tmp_path / "hf", *random_model(), tokenizer=tmp_path / "t")
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written == named | {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["w3"]}


def _as_we_store(name: str, tensor: np.ndarray, heads: dict[str, int]) -> np.ndarray:
    """Undoes the order of rows that the converter gives queries and keys of Llama."""
    kind = name.rpartition(".")[0].rpartition(".")[2]
    if kind not in heads:
        return tensor
    pairs = tensor.reshape(heads[kind], -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _stacked(ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a layer's experts as one, under the names of Qwen3."""
    found: dict[str, Any] = {}
    for name, tensor in ours.items():
        name = name.replace("block_sparse_moe", "mlp")
        for theirs, kind in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{theirs}.", f".{kind}.")
        together = re.sub(r"\.experts\.\d+", ".experts", name)
        found.setdefault(together, {})[int(name.split(".experts.")[1].split(".")[0]) if together != name else 0] = (
            tensor
        )
    return {
        name: np.stack([parts[e] for e in sorted(parts)]) if ".experts." in name else parts[0]
        for name, parts in found.items()
    }


def _theirs(name: str, family: str) -> str:
    *layer, kind, parameter = name.split(".")
    theirs = "mlp.gate_up_proj" if (family, kind) == ("phi3", "ffn_up") else NAMES[kind]
    return f"model.layers.{layer[1]}.{theirs}.{parameter}" if layer else f"{theirs}.{parameter}"


@pytest.fixture(scope="module")
def converted(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name: the model, its weights, the export, the GGUF file and what it holds."""
    made: dict[str, Any] = {}
    # What is dropped is seen in the runtime alone.
    for name, (family, settings) in (SAME | DROPPED if gguf_files.has_runtime() else SAME).items():
        folder = tmp_path_factory.mktemp("model")
        made[name] = *_export(folder / "hf", family, settings, pieces), folder / "hf", folder / "f32.gguf"
    told = gguf_files.convert_all([parts[2:] for parts in made.values()])
    assert all("successfully exported" in last for last in told), dict(zip(made, told, strict=True))
    held = gguf_files.read_all([file for *_, file in made.values()])
    return {name: (*parts, found) for (name, parts), found in zip(made.items(), held, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_converter_reads_every_family(name: str, converted: Any, pieces: Path) -> None:
    family, _ = SAME[name]
    model, _, directory, _, (held, tensors_of_file) = converted[name]
    config, found = model.config, dict(tensors_of_file)
    architecture = {"mistral": "llama", "mixtral": "llama"}.get(family, family)
    assert held["general.architecture"] == architecture
    stated = {key.removeprefix(f"{architecture}."): value for key, value in held.items()}
    expected = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 50000.0,
        "attention.layer_norm_rms_epsilon": float(np.float32(3e-5)),
    }
    if family != "phi3":  # which has no other size
        expected |= {"attention.key_length": config.head_size, "attention.value_length": config.head_size}
    if config.rope_scaling.name in ("linear", "yarn"):
        expected |= {"rope.scaling.type": config.rope_scaling.name, "rope.scaling.factor": 4.0}
    if config.rope_scaling.name == "yarn":
        expected |= {"rope.scaling.original_context_length": 64}
        expected |= {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}
    assert {key: stated.get(key) for key in expected} == expected
    if config.rope_scaling.name == "llama3":
        plain = np.asarray(rotary_frequencies(16, 50000.0))
        rotations = plain * 64 / (2 * math.pi)
        unscaled = np.clip((rotations - 1) / 3, 0, 1)
        np.testing.assert_allclose(found.pop("rope_freqs.weight"), 1 / ((1 - unscaled) / 8 + unscaled), rtol=1e-5)
    if config.moe.num_experts:
        expected |= {"expert_count": config.moe.num_experts, "expert_used_count": config.moe.num_experts_per_tok}
    ours = _stacked(tensors(directory))
    heads = {"attn_q": 4, "attn_k": 2} if architecture == "llama" else {}
    assert {_theirs(tensor, family) for tensor in found} == set(ours)
    for tensor, values in found.items():
        np.testing.assert_array_equal(_as_we_store(tensor, values, heads), ours[_theirs(tensor, family)], tensor)
    vocabulary = Tokenizer.from_file(str(pieces / "tokenizer.json"))
    assert held["tokenizer.ggml.tokens"] == [vocabulary.id_to_token(i) for i in range(2500)]
    special = [held[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")]
    assert special == [1, 2] and held["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_runtime_computes_the_same(name: str, request: pytest.FixtureRequest, pieces: Path) -> None:
    gguf_files.require_runtime()
    model, params, _, file, _ = request.getfixturevalue("converted")[name]
    found = gguf_files.compute(file, TOKENS[0].tolist(), new_tokens=24, texts=TEXTS)
    assert "error" not in found, found
    ours = run(model, params, TOKENS)[0]
    np.testing.assert_allclose(found["logits"], ours, atol=1e-4)
    assert len(set(ours.argmax(-1).tolist())) > 10  # not one token after every text
    assert found["greedy"] == generate(model, params, TOKENS[0], max_new_tokens=24).sequences[0]
    vocabulary = Tokenizer.from_file(str(pieces / "tokenizer.json"))
    assert found["ids"] == [vocabulary.encode(text).ids for text in TEXTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_is_what_the_document_says(name: str, request: pytest.FixtureRequest) -> None:
    gguf_files.require_runtime()
    model, params, _, file, _ = request.getfixturevalue("converted")[name]
    found = gguf_files.compute(file, TOKENS[0].tolist())["logits"]
    away = np.abs(found - run(model, params, TOKENS)[0]).max(-1)
    assert away.max() > 1e-2
    if "window" in name:  # as long as no text is longer than the window, it is the same model
        assert away[:8].max() < 1e-4


@pytest.mark.slow
def test_an_attention_factor_is_given_when_loading(pieces: Path, tmp_path: Path) -> None:
    gguf_files.require_runtime()
    scaling = RopeScaling(name="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3)
    model, params = _export(tmp_path / "hf", "llama", {"rope_scaling": scaling}, pieces)
    gguf_files.convert(tmp_path / "hf", tmp_path / "f32.gguf")
    ours = run(model, params, TOKENS)[0]
    plain = gguf_files.compute(tmp_path / "f32.gguf", TOKENS[0].tolist())["logits"]
    assert np.abs(plain - ours).max() > 1e-2
    factor = {"llama.rope.scaling.attn_factor": 1.3 / (0.1 * math.log(4) + 1)}
    given = gguf_files.compute(tmp_path / "f32.gguf", TOKENS[0].tolist(), overrides=factor)["logits"]
    np.testing.assert_allclose(given, ours, atol=1e-4)


@pytest.mark.slow
def test_what_the_runtime_refuses(pieces: Path, tmp_path: Path) -> None:
    gguf_files.require_runtime()
    refused = {"qwen3": BIASES | {"qk_norm": True}, "qwen2": {"attention_bias": True, "head_dim": 32}}
    for family, settings in refused.items():
        _export(tmp_path / family, family, settings, pieces)
        gguf_files.convert(tmp_path / family, tmp_path / f"{family}.gguf")
        assert "Failed to load model" in gguf_files.compute(tmp_path / f"{family}.gguf")["error"]
    # A name with phi3 in it makes the runtime look for Phi-3's own tokens.
    _export(tmp_path / "my_phi3", "phi3", {}, pieces)
    gguf_files.convert(tmp_path / "my_phi3", tmp_path / "named.gguf")
    assert "Failed to load model" in gguf_files.compute(tmp_path / "named.gguf")["error"]
    gguf_files.convert(tmp_path / "my_phi3", tmp_path / "other.gguf", "--model-name", "mine")
    assert "error" not in gguf_files.compute(tmp_path / "other.gguf")


@pytest.mark.slow
def test_layers_of_our_own_are_refused(pieces: Path, tmp_path: Path) -> None:
    model, params = _model(parallel_residual=True)
    save_pretrained(tmp_path / "hf", model, params, tokenizer=pieces)
    last = gguf_files.convert(tmp_path / "hf", tmp_path / "f32.gguf")
    assert last.endswith("Model StellarByteForCausalLM is not supported")


@pytest.mark.slow
def test_our_tokenizer_passes_with_the_program_of_the_document(tmp_path: Path) -> None:
    model, params = _model(vocab_size=32000)
    save_pretrained(tmp_path / "hf", model, params, tokenizer=OWN_TOKENIZER)
    last = gguf_files.convert(tmp_path / "hf", tmp_path / "refused.gguf")
    assert "BPE pre-tokenizer was not recognized" in last
    text = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8")
    [program] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "get_vocab_base_pre" in b]
    (gguf_files.converter() / "to_gguf.py").write_text(program, encoding="utf-8")
    file = tmp_path / "f32.gguf"
    assert "successfully exported" in gguf_files.convert(tmp_path / "hf", file, program="to_gguf.py")
    held, _ = gguf_files.read(file)
    ours = Tokenizer.from_file(str(OWN_TOKENIZER / "tokenizer.json"))
    assert held["tokenizer.ggml.tokens"] == [ours.id_to_token(i) for i in range(32000)]
    assert (held["tokenizer.ggml.pre"], held["tokenizer.ggml.add_bos_token"]) == ("qwen2", True)
    special = [held[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")]
    assert special == [1, 2, 0] and "<|SBOS|>" in held["tokenizer.chat_template"]
    gguf_files.require_runtime()
    code = "def f(x):\n    return x"
    *texts, indented = gguf_files.compute(file, texts=[*TEXTS, code])["ids"]
    assert texts == [ours.encode(text).ids for text in TEXTS]
    assert indented != ours.encode(code).ids  # hence prompts of code are given as ids


@pytest.mark.slow
def test_a_pretrained_model(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    source = smollm2()
    model, params = from_pretrained(source, compute_dtype="float32")
    save_pretrained(tmp_path / "hf", model, params, tokenizer=source)
    file = tmp_path / "f32.gguf"
    assert "successfully exported" in gguf_files.convert(tmp_path / "hf", file)
    gguf_files.require_runtime()
    ours = Tokenizer.from_file(str(source / "tokenizer.json"))
    prompt = ours.encode(TEXTS[0]).ids[:32]
    found = gguf_files.compute(file, prompt, new_tokens=48, texts=TEXTS)
    assert found["greedy"] == generate(model, params, np.asarray(prompt), max_new_tokens=48).sequences[0]
    np.testing.assert_allclose(found["logits"], run(model, params, np.asarray([prompt]))[0], atol=1e-3)
    assert found["ids"] == [ours.encode(text).ids for text in TEXTS]

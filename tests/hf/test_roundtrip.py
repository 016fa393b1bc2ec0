"""Conversion against transformers: the same numbers, in both directions, and nothing lost."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, SMALL, assert_same_tree, random_model, save_words, tensors
from helpers.variants import run

from stellarbyte_jax.config import RopeScaling
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer

PEERS = {
    "llama": ("llama", {}),
    "llama-tied-wide-heads-gelu": (
        "llama",
        {"tie_word_embeddings": True, "head_dim": 16, "hidden_act": "gelu", "rope_theta": 5e4, "rms_norm_eps": 1e-3},
    ),
    "llama-multi-head-tanh": ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-wide-heads-tied": (
        "mistral",
        {"sliding_window": None, "head_dim": 24, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-windows": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias-windows": (
        "qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5}),
    "mixtral-tied-window": (
        "mixtral",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "head_dim": 16,
            "hidden_act": "gelu",
        },
    ),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}),
    "qwen3_moe-dense-layers-bias-window": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_hidden_layers": 5,
            "mlp_only_layers": [0, 3],
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "qwen3_moe-every-second-layer-tied": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 5,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi3-window": ("phi3", {"pad_token_id": 0, "sliding_window": 5, "num_key_value_heads": 1}),
}


def scaled(family: str, max_positions: int, **table: Any) -> tuple[str, dict[str, Any]]:
    return family, {"max_position_embeddings": max_positions, "rope_parameters": {"rope_theta": 500.0} | table}


# The tokens below are more than each of these was trained on.
SCALED_PEERS = {
    "llama-linear": scaled("llama", 8, rope_type="linear", factor=4.0),
    "llama-dynamic": scaled("llama", 8, rope_type="dynamic", factor=4.0),
    "llama-yarn": scaled("llama", 32, rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
    "llama-yarn-all": scaled(
        "llama",
        40,
        rope_type="yarn",
        factor=5.0,
        original_max_position_embeddings=8,
        attention_factor=0.8,
        beta_fast=1.5,
        beta_slow=0.1,
    ),
    "llama-llama3": scaled(
        "llama",
        64,
        rope_type="llama3",
        factor=8.0,
        original_max_position_embeddings=8,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    "mistral-linear-window": ("mistral", scaled("", 8, rope_type="linear", factor=4.0)[1] | {"sliding_window": 9}),
}
PEERS |= SCALED_PEERS
TOKENS_BT = np.random.default_rng(0).integers(0, 96, (2, 24), dtype=np.int32)


@pytest.fixture(scope="module")
def peer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model of transformers on disk, every weight of which matters; each is made once and only read."""
    folder = tmp_path_factory.mktemp("peers")

    def found(name: str, dtype: str = "float32") -> Path:
        place = folder / f"{name}-{dtype}"
        return place if place.exists() else make_peer(place, *PEERS[name], dtype=dtype)

    return found


def make_peer(directory: Path, family: str, settings: dict[str, Any], dtype: str = "float32") -> Path:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)  # threads cost more than such a model
    torch.manual_seed(0)
    settings = SMALL | settings
    theta = settings.pop("rope_theta", None)
    if theta is not None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="30KB")
    return directory


@functools.cache
def peer_logits(directory: Path) -> np.ndarray:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS_BT.astype(np.int64))).logits.numpy()


def logits(model: ByteTransformer, params: dict[str, Any]) -> np.ndarray:
    return np.asarray(run(model, params, TOKENS_BT))


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_transformers(name: str, peer_of: Callable[..., Path]) -> None:
    peer = peer_of(name)
    model, params = from_pretrained(peer, compute_dtype="float32")
    theirs = peer_logits(peer)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits(model, params), theirs, atol=1e-4, rtol=0)


def test_the_window_matters(peer_of: Callable[..., Path]) -> None:
    peer = peer_of("mistral-window")
    model, params = from_pretrained(peer, compute_dtype="float32", sliding_window=None)
    assert np.abs(logits(model, params) - peer_logits(peer)).max() > 1e-2


@pytest.mark.parametrize("name", SCALED_PEERS)
def test_the_scaling_matters(name: str, peer_of: Callable[..., Path]) -> None:
    peer = peer_of(name)
    # Of one number of positions, which means nothing without scaling: one program for all.
    model, params = from_pretrained(peer, compute_dtype="float32", rope_scaling={}, max_position_embeddings=64)
    assert model.config.rope_scaling == RopeScaling()
    assert np.abs(logits(model, params) - peer_logits(peer)).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama-tied-wide-heads-gelu", "mistral-window", "llama-biases", "qwen2", "qwen3-bias-windows"),
        *("phi3", "mixtral-tied-window", "qwen3_moe-dense-layers-bias-window"),
    ],
)
def test_there_and_back_is_bit_equal(name: str, dtype: str, peer_of: Callable[..., Path], tmp_path: Path) -> None:
    peer = peer_of(name, dtype)
    model, params = from_pretrained(peer)
    save_pretrained(tmp_path / "back", model, params, dtype=dtype, family=PEERS[name][0])
    before, after = tensors(peer), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert after[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("name", PEERS)
def test_the_exported_config_means_the_same(name: str, peer_of: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    peer = peer_of(name)
    save_pretrained(tmp_path / "back", *from_pretrained(peer), family=PEERS[name][0])
    before, after = (transformers.AutoConfig.from_pretrained(d).to_dict() for d in (peer, tmp_path / "back"))
    for config in (before, after):
        for field in ("_name_or_path", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"):
            config.pop(field, None)
        # Read where nothing else says which layers have windows, or by LongRoPE.
        for field in ("max_window_layers", "original_max_position_embeddings"):
            config.pop(field, None)
    after.pop("rope_theta", None)
    if before["rope_parameters"]["rope_type"] == "yarn":  # what they assume is written
        before["rope_parameters"] = {"beta_fast": 32.0, "beta_slow": 1.0} | before["rope_parameters"]
    if before.get("head_dim") is None:  # derived there
        assert (after.pop("head_dim", 8), before.pop("head_dim", None)) == (8, None)
    assert after == before
    np.testing.assert_array_equal(peer_logits(tmp_path / "back"), peer_logits(peer))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "vocab_size_multiple": 64},
        {"sliding_window": 7, "attention_dropout": 0.1, "hidden_dropout": 0.1, "residual_dropout": 0.1},
        {"layer_types": ("sliding_attention",) * 3, "sliding_window": 7},
        {"layer_types": ("full_attention",) * 3, "vocab_size_multiple": 64},
        {"hidden_size": 36, "num_attention_heads": 8, "head_dim": 6},  # heads do not divide the hidden size
        {"num_key_value_heads": None, "intermediate_size": None, "head_dim": None, "drop_path": 0.1},
        {"rope_pairing": "interleaved", "initialization": "stellarbyte"},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "rope_pairing": "interleaved"},
        {"rope_scaling": {"name": "yarn", "factor": 4.0}, "max_position_embeddings": 8},
        {"rope_scaling": {"name": "llama3", "factor": 4.0}, "max_position_embeddings": 8, "sliding_window": 9},
    ],
    ids=str,
)
def test_our_models_load_with_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    model, params = random_model(**settings)
    save_pretrained(tmp_path / "hf", model, params)
    np.testing.assert_allclose(logits(model, params), peer_logits(tmp_path / "hf"), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"sliding_window": 7},
        {"attention_bias": True, "attention_output_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {"name": "linear", "factor": 2.0}},
        {"rope_scaling": {"name": "dynamic", "factor": 2.0}, "sliding_window": 7},
        {"rope_scaling": {"name": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 3.0}},
        {"rope_scaling": {"name": "llama3", "factor": 2.0, "original_max_position_embeddings": 32}},
    ],
    ids=str,
)
def test_our_models_come_back_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    model, params = random_model(**settings)
    save_pretrained(tmp_path / "hf", model, params, max_shard_bytes=20_000)
    back, back_params = from_pretrained(tmp_path / "hf", compute_dtype="float32")
    assert back.config == dataclasses.replace(model.config, head_dim=8)
    assert_same_tree(back_params, params)


def test_interleaved_pairs_come_back_as_halves(tmp_path: Path) -> None:
    model, params = random_model(rope_pairing="interleaved")
    save_pretrained(tmp_path / "hf", model, params)
    back, back_params = from_pretrained(tmp_path / "hf", compute_dtype="float32")
    assert back.config.rope_pairing == "half"
    assert np.abs(np.asarray(back_params["layers"]["0"]["attn"]["q"] - params["layers"]["0"]["attn"]["q"])).max() > 0.1
    np.testing.assert_allclose(logits(back, back_params), logits(model, params), atol=1e-5, rtol=0)


def test_the_command_for_a_pickle_writes_safetensors_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, in a folder that a shell would take apart; the tokenizer stays with the weights."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    directory = save_words(tmp_path / "a model", ["a", "b"])
    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params)
    torch.save(
        {name: torch.from_numpy(x) for name, x in tensors(tmp_path / "hf").items()}, directory / "pytorch_model.bin"
    )
    (directory / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    with pytest.raises(ValueError) as caught:
        from_pretrained(directory)
    program, flag, code, *arguments = shlex.split(str(caught.value).partition("once: ")[2])
    assert (program, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    assert_same_tree(from_pretrained(directory)[1], params)
    assert (directory / "tokenizer.json").is_file()

"""Conversion against transformers: the same numbers, in both directions, and nothing lost."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.variants import run
from safetensors import safe_open

from stellarbyte_jax.config import ByteConfig, CacheConfig, RopeScaling
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.families import export_family
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

NEEDS_TORCH = "the peer is transformers on torch: pip install -e '.[torch]'"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
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


def make_peer(directory: Path, family: str, settings: dict[str, Any], dtype: str = "float32") -> Path:
    """A random model of transformers on disk, every weight of which matters."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    configs, models = (
        {"llama": LlamaConfig, "mistral": MistralConfig},
        {
            "llama": LlamaForCausalLM,
            "mistral": MistralForCausalLM,
        },
    )
    torch.manual_seed(0)
    settings = SMALL | settings
    theta = settings.pop("rope_theta", None)
    if theta is not None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    model = models[family](configs[family](**settings))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="30KB")
    return directory


def peer_logits(directory: Path) -> np.ndarray:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS_BT.astype(np.int64))).logits.numpy()


def logits(model: ByteTransformer, params: dict[str, Any]) -> np.ndarray:
    return np.asarray(run(model, params, TOKENS_BT))


def tensors(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():
                assert name not in found
                found[name] = handle.get_tensor(name)
    return found


def assert_same_tree(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def random_model(**settings: Any) -> tuple[ByteTransformer, dict[str, Any]]:
    model = ByteTransformer(ByteConfig(**(SMALL | {"compute_dtype": "float32"} | settings)))
    numbers = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda leaf: np.float32(0.2) * numbers.standard_normal(leaf.shape, "f4") + np.float32(0.1), param_shapes(model)
    )


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    peer = make_peer(tmp_path / "peer", *PEERS[name])
    model, params = from_pretrained(peer, compute_dtype="float32")
    theirs = peer_logits(peer)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits(model, params), theirs, atol=1e-4, rtol=0)


def test_the_window_matters(tmp_path: Path) -> None:
    peer = make_peer(tmp_path / "peer", "mistral", {"sliding_window": 5})
    model, params = from_pretrained(peer, compute_dtype="float32", sliding_window=None)
    assert np.abs(logits(model, params) - peer_logits(peer)).max() > 1e-2


@pytest.mark.parametrize("name", SCALED_PEERS)
def test_the_scaling_matters(name: str, tmp_path: Path) -> None:
    peer = make_peer(tmp_path / "peer", *PEERS[name])
    model, params = from_pretrained(peer, compute_dtype="float32", rope_scaling={})
    assert model.config.rope_scaling == RopeScaling()
    assert np.abs(logits(model, params) - peer_logits(peer)).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "llama-tied-wide-heads-gelu", "mistral-window", "llama-biases"])
def test_there_and_back_is_bit_equal(name: str, dtype: str, tmp_path: Path) -> None:
    peer = make_peer(tmp_path / "peer", *PEERS[name], dtype=dtype)
    model, params = from_pretrained(peer)
    save_pretrained(tmp_path / "back", model, params, dtype=dtype)
    before, after = tensors(peer), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert after[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("name", PEERS)
def test_the_exported_config_means_the_same(name: str, tmp_path: Path) -> None:
    import transformers

    peer = make_peer(tmp_path / "peer", *PEERS[name])
    save_pretrained(tmp_path / "back", *from_pretrained(peer))
    before, after = (transformers.AutoConfig.from_pretrained(d).to_dict() for d in (peer, tmp_path / "back"))
    for config in (before, after):
        for field in ("_name_or_path", "transformers_version", "bos_token_id", "eos_token_id"):
            config.pop(field, None)
    after.pop("rope_theta", None)
    if before["rope_parameters"]["rope_type"] == "yarn":  # what they assume is written
        before["rope_parameters"] = {"beta_fast": 32.0, "beta_slow": 1.0} | before["rope_parameters"]
    if name == "mistral-wide-heads-tied":  # without a window it is a Llama
        assert (before.pop("model_type"), after.pop("model_type")) == ("mistral", "llama")
        before = {k: v for k, v in before.items() if k in after and k != "architectures"}
        after = {k: v for k, v in after.items() if k in before}
    assert after == before
    np.testing.assert_array_equal(peer_logits(tmp_path / "back"), peer_logits(peer))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        {"sliding_window": 7},
        {"layer_types": ("sliding_attention",) * 3, "sliding_window": 7},
        {"layer_types": ("full_attention",) * 3, "sliding_window": 7},
        {"hidden_size": 36, "num_attention_heads": 8, "head_dim": 6},  # heads do not divide the hidden size
        {"num_key_value_heads": None, "intermediate_size": None, "head_dim": None},
        {"rope_pairing": "interleaved"},
        {"attention_dropout": 0.1, "hidden_dropout": 0.1, "residual_dropout": 0.1},
        {"drop_path": 0.1, "initialization": "stellarbyte"},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "rope_pairing": "interleaved"},
        {"vocab_size_multiple": 64},
        {"vocab_size_multiple": 64, "tie_word_embeddings": True},
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


@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_of_the_vocabulary_stays_here(tied: bool, tmp_path: Path) -> None:
    model, params = random_model(vocab_size_multiple=64, tie_word_embeddings=tied)
    assert params["embed"]["embedding"].shape == (128, 32)
    save_pretrained(tmp_path / "hf", model, params)
    written = tensors(tmp_path / "hf")
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], params["embed"]["embedding"][:96])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 96
    trimmed = params | {"embed": {"embedding": params["embed"]["embedding"][:96]}}
    padded = params | {"embed": {"embedding": np.pad(trimmed["embed"]["embedding"], ((0, 32), (0, 0)))}}
    if not tied:
        np.testing.assert_array_equal(written["lm_head.weight"], params["lm_head"]["kernel"][:, :96].T)
        trimmed["lm_head"] = {"kernel": params["lm_head"]["kernel"][:, :96]}
        padded["lm_head"] = {"kernel": np.pad(trimmed["lm_head"]["kernel"], ((0, 0), (0, 32)))}
    assert_same_tree(from_pretrained(tmp_path / "hf")[1], trimmed)
    back, back_params = from_pretrained(tmp_path / "hf", vocab_size_multiple=64, compute_dtype="float32")
    assert back.config.padded_vocab_size == 128
    assert_same_tree(back_params, padded)
    np.testing.assert_array_equal(logits(back, back_params), logits(model, params))


def test_shards_hold_every_tensor_once_and_stay_small(tmp_path: Path) -> None:
    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params, max_shard_bytes=16_000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "hf" / f).stat().st_size < 16_000 + 4_000 for f in files)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "hf").keys()
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    save_pretrained(tmp_path / "one", model, params)
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_in_memory_and_on_disk(dtype: str, tmp_path: Path) -> None:
    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params, dtype=dtype)
    assert {str(t.dtype) for t in tensors(tmp_path / "hf").values()} == {dtype}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == dtype
    _, read = from_pretrained(tmp_path / "hf", dtype=dtype)
    assert_same_tree(read, jax.tree.map(lambda x: x.astype(dtype), params))


def test_runtime_settings_are_given_when_reading(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "hf", *random_model(compute_dtype="float32", remat="full"))
    config = from_pretrained(tmp_path / "hf", remat="dots", scan_unroll=None)[0].config
    assert (config.compute_dtype, config.remat, config.scan_unroll) == ("bfloat16", "dots", None)
    with pytest.raises(ValueError, match=r"scan_unrol.*did you mean scan_unroll"):
        from_pretrained(tmp_path / "hf", scan_unrol=2)


def test_sections_are_given_when_reading(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "hf", *random_model(rope_scaling={"name": "linear", "factor": 3.0}))
    as_objects = {"rope_scaling": RopeScaling(name="yarn", factor=2.0), "cache": CacheConfig(dtype="int8")}
    as_mappings = {"rope_scaling": {"name": "yarn", "factor": 2.0}, "cache": {"dtype": "int8"}}
    configs = [from_pretrained(tmp_path / "hf", **given)[0].config for given in (as_objects, as_mappings)]
    assert configs[0] == configs[1]
    assert (configs[0].rope_scaling.name, configs[0].cache.dtype) == ("yarn", "int8")
    config = from_pretrained(tmp_path / "hf", memory={"length": 6, "recent_share": 0.5})[0].config
    assert config.memory.length == 6
    assert config.rope_scaling == RopeScaling(name="linear", factor=3.0)
    with pytest.raises(ValueError, match=r"RopeScaling: there is no setting 'kind'"):
        from_pretrained(tmp_path / "hf", rope_scaling={"kind": "yarn"})


def test_both_generations_of_config_json_are_written(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "hf", *random_model(rope_theta=777.0), dtype="bfloat16")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 777.0
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["bos_token_id"] is None
    assert "rope_scaling" not in written

    scaling = RopeScaling(name="llama3", factor=2.0)
    save_pretrained(tmp_path / "longer", *random_model(rope_theta=777.0, rope_scaling=scaling))
    written = json.loads((tmp_path / "longer" / "config.json").read_text())
    table = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    table["original_max_position_embeddings"] = 64  # which is what None means
    assert written["rope_theta"] == 777.0
    assert written["rope_scaling"] == table
    assert written["rope_parameters"] == table | {"rope_theta": 777.0}


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    source = tmp_path / "tokenizer"
    source.mkdir()
    words = {"<b>": 0, "<e>": 1, "<p>": 2, "x": 3}
    Tokenizer(models.WordLevel(words, unk_token="x")).save(str(source / "tokenizer.json"))
    names = {"bos_token": "<b>", "eos_token": {"content": "<e>"}, "pad_token": "<p>", "unk_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params, tokenizer=source)
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "hf" / file).read_text())
        assert [written[f"{t}_token_id"] for t in ("bos", "eos", "pad")] == [0, 1, 2]
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    save_pretrained(tmp_path / "several", model, params, tokenizer=source)
    assert json.loads((tmp_path / "several" / "config.json").read_text())["eos_token_id"] == [1, 3]


def test_a_model_is_exported_as_the_simplest_family() -> None:
    def family(**settings: Any) -> str:
        return export_family(ByteConfig(**(SMALL | settings))).model_type

    assert family() == "llama"
    assert family(sliding_window=8) == "mistral"
    assert family(hidden_size=36, num_attention_heads=8, head_dim=6) == "mistral"
    assert family(layer_types=("full_attention",) * 3, sliding_window=8) == "llama"
    assert family(attention_bias=True, attention_output_bias=True) == "llama"
    assert family(rope_scaling={"name": "yarn", "factor": 2.0}, vocab_size_multiple=64) == "llama"


def test_memory_holds_the_weights_once(tmp_path: Path) -> None:
    model, params = random_model(vocab_size=8192, hidden_size=128, num_hidden_layers=8)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    tracemalloc.start()
    try:
        save_pretrained(tmp_path / "hf", model, params)
        assert tracemalloc.get_traced_memory()[1] < 0.8 * total  # the embedding is two fifths
        tracemalloc.reset_peak()
        from_pretrained(tmp_path / "hf")
        assert tracemalloc.get_traced_memory()[1] < 1.5 * total
    finally:
        tracemalloc.stop()

"""Foreign directories that are broken or ask for what does not exist here: one error that names the thing."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stellarbyte_jax.config import ByteConfig, RopeScaling
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.settings import parse_config
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

SMALL = ByteConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    compute_dtype="float32",
)
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model() -> tuple[ByteTransformer, dict[str, Any]]:
    made = ByteTransformer(SMALL)
    numbers = np.random.default_rng(0)
    return made, jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape, "f4"), param_shapes(made))


@pytest.fixture
def directory(tmp_path: Path, model: tuple[ByteTransformer, dict[str, Any]]) -> Path:
    save_pretrained(tmp_path / "hf", *model)
    return tmp_path / "hf"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type is 'gpt2'; supported are llama, mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures .* supported is LlamaForCausalLM"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'; supported are silu, swish, gelu"),
        (
            {"model_type": "mistral", "architectures": None, "attention_bias": True},
            r"attention_bias is True; only False",
        ),
        ({"model_type": "mistral", "architectures": None, "mlp_bias": True}, r"mlp_bias is True; only False"),
        ({"attention_bias": None}, r"ByteConfig.attention_bias must be bool"),
        ({"pretraining_tp": 2}, r"pretraining_tp is 2; only 1"),
        ({"rope_interleaved": True}, r"rope_interleaved is True"),
        ({"rope_scaling": {"type": "longrope"}}, r"rope_scaling.rope_type is 'longrope'; implemented are default, li"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type is \['yarn'\]"),
        ({"rope_scaling": "linear"}, r"rope_scaling must be an object, got 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling lacks factor, which rope_type 'linear' needs"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling holds factor: not implemented for rope_type 'default'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
            r"rope_scaling says rope_type 'yarn' and type 'linear'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_parameters and rope_scaling contradict each other",  # the directory has rope_parameters
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            r"config.json: rope_parameters: .*factor must be at least 1, got 0.5",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
            r"rope_parameters holds original_max_position_embeddings: not implemented for rope_type 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
            r"rope_parameters holds mscale, mscale_all_dim: not implemented for rope_type 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            r"rope_parameters.truncate is False; only true",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            r"rope_parameters lacks low_freq_factor, high_freq_factor, which rope_type 'llama3' needs",
        ),
        ({"rope_parameters": {"full_attention": {}}}, r"rope_parameters holds full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters.partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5"),
        ({"rope_theta": 5.0}, r"contradicting values .*rope_theta.*rope_parameters.rope_theta"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: not implemented for llama"),
        ({"sliding_window": 4}, r"sliding_window: not implemented for llama"),
        ({"hidden_sise": 4}, r"hidden_sise \(did you mean hidden_size\?\)"),
        ({"num_attention_heads": 3}, r"config.json: .*num_attention_heads 3"),
        ({"vocab_size": "many"}, r"config.json: .*vocab_size must be int"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_unsupported_settings_are_named(directory: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(directory)


def test_settings_of_both_generations_are_read() -> None:
    def theta(**values: Any) -> float:
        return parse_config({"model_type": "llama"} | values, "here")[1].rope_theta

    assert theta() == 10000.0
    assert theta(rope_theta=5.0) == 5.0
    assert theta(rope_theta=5.0, rope_scaling=None) == 5.0
    assert theta(rope_parameters={"rope_type": "default", "rope_theta": 5.0}) == 5.0
    assert theta(rope_theta=5.0, rope_scaling={"rope_type": "default"}) == 5.0
    assert theta(rope_theta=5.0, rope_scaling={"type": "linear", "factor": 2}) == 5.0


def test_scalings_of_both_generations_are_read() -> None:
    def scaling(**values: Any) -> RopeScaling:
        return parse_config({"model_type": "llama", "max_position_embeddings": 512} | values, "here")[1].rope_scaling

    linear = RopeScaling(name="linear", factor=2.0)
    assert scaling(rope_scaling={}) == scaling(rope_scaling={"type": "default"}) == RopeScaling()
    assert scaling(rope_scaling={"type": "linear", "factor": 2}) == linear
    assert scaling(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0}) == linear
    assert scaling(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}) == linear
    both = {"rope_type": "linear", "factor": 2.0}
    assert scaling(rope_scaling=both, rope_parameters=both | {"rope_theta": 5.0}) == linear
    assert scaling(rope_scaling={}, rope_parameters=both) == linear
    assert scaling(rope_scaling={"type": "dynamic", "factor": 2.0}) == RopeScaling(name="dynamic", factor=2.0)
    # Without an original length the model's own is meant.
    yarn = {"rope_type": "yarn", "factor": 2.0, "truncate": True, "mscale": None}
    expected = RopeScaling(name="yarn", factor=2.0, original_max_position_embeddings=512)
    assert scaling(rope_scaling=yarn) == expected
    assert scaling(rope_scaling=yarn | {"original_max_position_embeddings": 64, "attention_factor": 0.5}) == (
        dataclasses.replace(expected, original_max_position_embeddings=64, attention_factor=0.5)
    )
    llama3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
    assert scaling(rope_scaling=llama3) == dataclasses.replace(
        expected, name="llama3", low_freq_factor=2.0, high_freq_factor=3.0
    )


def test_biases_of_llama_are_two_settings_here() -> None:
    def biases(**values: Any) -> tuple[bool, bool, bool]:
        config = parse_config({"model_type": "llama"} | values, "here")[1]
        return config.attention_bias, config.attention_output_bias, config.mlp_bias

    assert biases() == (False, False, False)
    assert biases(attention_bias=True) == (True, True, False)
    assert biases(mlp_bias=True) == (False, False, True)


def test_absent_settings_are_the_familys_defaults() -> None:
    llama = parse_config({"model_type": "llama"}, "here")[1]
    assert (llama.intermediate_size, llama.rms_norm_eps, llama.kv_heads, llama.sliding_window) == (
        11008,
        1e-6,
        32,
        None,
    )
    mistral = parse_config({"model_type": "mistral"}, "here")[1]
    assert (mistral.intermediate_size, mistral.kv_heads, mistral.sliding_window) == (14336, 8, 4096)
    assert parse_config({"model_type": "mistral", "sliding_window": None}, "here")[1].sliding_window is None


def test_the_defaults_are_those_of_transformers() -> None:
    pytest.importorskip("torch", reason="transformers' model configs are compared where the peer exists")
    from transformers import LlamaConfig, MistralConfig

    for config in (LlamaConfig(), MistralConfig()):
        stated = parse_config(config.to_dict(), "here")[1]
        absent = parse_config({"model_type": config.model_type, "head_dim": 128}, "here")[1]
        assert (absent.to_dict() | {"num_key_value_heads": absent.kv_heads}) == stated.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), f"missing {LAYER}"),
        (lambda t: t.pop("lm_head.weight"), "missing lm_head.weight"),
        (lambda t: t.update(surplus=np.zeros(2, "f4")), "unknown surplus"),
        (
            lambda t: t.update({LAYER: t[LAYER][:5].copy()}),
            rf"{LAYER} has shape \(5, 8\), the settings ask for \(12, 8\)",
        ),
        (lambda t: t.update({LAYER: t[LAYER].astype("i4")}), f"tensor {LAYER} is stored as I32"),
    ],
    ids=["missing", "missing head", "unknown", "shape", "integers"],
)
def test_tensors_that_do_not_fit_are_named(directory: Path, change: Any, message: str) -> None:
    edit_tensors(directory, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(directory)


def test_settings_that_need_other_weights_are_named(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not have: layers/0/attn_scale.*\(layer_scale_init\)"):
        from_pretrained(directory, layer_scale_init=0.1)
    with pytest.raises(ValueError, match=r"missing model\.layers\.0\.self_attn\.q_proj\.bias"):
        from_pretrained(directory, attention_bias=True)
    with pytest.raises(ValueError, match=r"unknown model\.layers\.0\.post_attention_layernorm\.weight"):
        from_pretrained(directory, parallel_residual=True)


def test_rotary_buffers_of_old_checkpoints_are_ignored(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, "f4")}))
    from_pretrained(directory)


def test_a_stored_copy_of_a_tied_head_must_be_equal(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        from_pretrained(directory)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    _, params = from_pretrained(directory)
    assert "lm_head" not in params


def test_broken_directories(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no directory"):
        from_pretrained(tmp_path / "nowhere")
    weights, config = directory / "model.safetensors", directory / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        from_pretrained(directory)
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        from_pretrained(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin, a pickle.*save_pretrained"):
        from_pretrained(directory)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        from_pretrained(directory)
    config.unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        from_pretrained(directory)


def test_broken_shards(tmp_path: Path, model: tuple[ByteTransformer, dict[str, Any]]) -> None:
    directory = tmp_path / "sharded"
    save_pretrained(directory, *model, max_shard_bytes=2_000)
    index = directory / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(
        json.dumps(whole | {"weight_map": whole["weight_map"] | {"ghost": "model-00001-of-00003.safetensors"}})
    )
    first = sorted(directory.glob("*.safetensors"))[0]
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"ghost": first.name}}))
    with pytest.raises(ValueError, match=r"index\.json lists ghost, which its files do not hold"):
        from_pretrained(directory)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match="has no weight_map"):
        from_pretrained(directory)
    index.write_text(json.dumps(whole))
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} does not exist, but"):
        from_pretrained(directory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position_embedding": "xpos"}, "position_embedding is 'xpos'"),
        ({"position_embedding": "stellarbyte"}, "position_embedding is 'stellarbyte'"),
        ({"position_embedding": "xpos", "xpos_learnable": True}, "xpos_learnable is true"),
        ({"mlp_style": "stellarbyte"}, "mlp_style is 'stellarbyte'"),
        ({"sliding_window": 4, "sink_tokens": 2}, "sink_tokens is 2"),
        ({"attention_prune_below": 0.01}, r"attention_prune_below is 0\.01"),
        ({"memory": {"length": 4}}, "memory.length is given"),
        ({"memory": {"length": (4, 0)}}, "model: memory.length is given[^;]*$"),
        ({"parallel_residual": True}, "parallel_residual is true"),
        ({"residual_scaling": "branch"}, "residual_scaling is 'branch'"),
        ({"residual_scaling": "deepnorm"}, "residual_scaling is 'deepnorm'"),
        ({"layer_scale_init": 0.1}, "layer_scale_init is given"),
        ({"rms_norm_eps_rule": "clamp"}, "rms_norm_eps_rule is 'clamp'"),
        ({"qk_norm": True}, "qk_norm is true"),
        ({"attention_bias": True}, "attention_bias is true without attention_output_bias"),
        ({"attention_output_bias": True}, "attention_output_bias is true without attention_bias"),
        (
            {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "sliding_window": 4},
            "attention_bias and mlp_bias: of those families only Llama has biases, but sliding_window needs Mistral",
        ),
        ({"mlp_bias": True, "num_attention_heads": 3, "head_dim": 4}, "mlp_bias: .* but head_dim needs Mistral"),
        ({"attention_logit_softcap": 30.0}, "attention_logit_softcap is 30"),
        ({"sliding_window": 4, "layer_types": ("full_attention", "sliding_attention")}, "layer_types mixes"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_no_family_expresses_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = ByteTransformer(ByteConfig(**(SMALL.to_dict() | settings)))
    with pytest.raises(ValueError, match=f"no Hugging Face family .*{message}"):
        save_pretrained(tmp_path / "hf", made, {})
    assert not (tmp_path / "hf").exists()


def test_weights_of_another_model(tmp_path: Path, model: tuple[ByteTransformer, dict[str, Any]]) -> None:
    made, params = model
    wrong = params | {"final_norm": {"scale": np.ones(9, "f4")}, "more": np.ones(1, "f4")}
    del wrong["lm_head"]
    with pytest.raises(ValueError, match=r"missing lm_head/kernel; unknown more; final_norm/scale has shape \(9,\)"):
        save_pretrained(tmp_path / "hf", made, wrong)


def test_numbers_too_large_for_float16(tmp_path: Path, model: tuple[ByteTransformer, dict[str, Any]]) -> None:
    made, params = model
    large = params | {"final_norm": {"scale": np.full(8, 1e5, "f4")}}
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds 100000, which float16 cannot represent"):
        save_pretrained(tmp_path / "hf", made, large, dtype="float16")
    assert os.listdir(tmp_path) == []  # nothing half-written stays behind


def test_a_failed_save_leaves_the_earlier_export(
    directory: Path, model: tuple[ByteTransformer, dict[str, Any]]
) -> None:
    before = (directory / "model.safetensors").read_bytes()
    made, params = model
    with pytest.raises(ValueError, match="is not empty"):
        save_pretrained(directory, made, params)
    large = params | {"final_norm": {"scale": np.full(8, 1e5, "f4")}}
    with pytest.raises(ValueError, match="float16"):
        save_pretrained(directory, made, large, dtype="float16", overwrite=True)
    assert (directory / "model.safetensors").read_bytes() == before
    save_pretrained(directory, made, params, dtype="bfloat16", overwrite=True)
    assert (directory / "model.safetensors").stat().st_size < len(before)
    assert os.listdir(directory.parent) == ["hf"]


def test_a_directory_of_something_else_is_not_overwritten(
    tmp_path: Path, model: tuple[ByteTransformer, dict[str, Any]]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"no model \(no config\.json\)"):
        save_pretrained(tmp_path / "home", *model, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(tmp_path / "home" / "letter.txt", *model)


def test_bad_arguments(tmp_path: Path, model: tuple[ByteTransformer, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        save_pretrained(tmp_path / "hf", *model, dtype="int8")
    with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
        save_pretrained(tmp_path / "hf", *model, max_shard_bytes=0)


def test_tokenizers_that_do_not_fit(tmp_path: Path, model: tuple[ByteTransformer, dict[str, Any]]) -> None:
    from tokenizers import Tokenizer, models

    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    Tokenizer(models.WordLevel({str(i): i for i in range(25)}, unk_token="0")).save(str(source / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 25 tokens, the model's vocab_size is 24"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match=r"eos_token is '<end>', which tokenizer\.json does not hold"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that the tokenizers library can read"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    assert not (tmp_path / "hf").exists()


def test_a_failed_rename_puts_the_earlier_export_back(
    directory: Path, model: tuple[ByteTransformer, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no more renames")
        return rename(self, target)

    before = (directory / "model.safetensors").read_bytes()
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no more renames"):
        save_pretrained(directory, *model, dtype="bfloat16", overwrite=True)
    assert (directory / "model.safetensors").read_bytes() == before
    assert os.listdir(directory.parent) == ["hf"]

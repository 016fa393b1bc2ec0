"""Config files of the original: what is taken over, what is told, what is refused, and what its trainers ignored."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import is_one_line
from helpers.original_models import (
    DECEMBER,
    DECEMBER_REST,
    SEED,
    SEED_REST,
    december_state,
    saved,
    saved_config,
    seed_state,
)
from transformers import PretrainedConfig

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.original import from_original

SEED_YAML = """
experiment: {seed: 42, use_swanlab: false, swanlab: {api_key: "secret"}}
training:
  batch_size: 32
model:
  vocab_size: 25
  dim: 64
  n_layers: 12
  n_heads: 16
  n_kv_heads: 8
  hidden_dim: null
  dim_multiplier: 4
  max_seq_len: 128
  dropout: {drop_path_prob: 0.0, hidden_dropout_prob: 0.2, attention_dropout_prob: 0.1, residual_dropout_prob: 0.1}
  norm: {layer_norm_eps: 1e-3, initializer_range: 0.02, layerscale_init: 1e-5}
  embeddings: {tie_word_embeddings: false}
  xpos: {rope_theta: 500.0, scale_base: 64.0}
  attention: {use_flash_attention: false, use_causal: false}
  kv_cache: {use_cache: true, key_dtype: "float16", value_dtype: "float16"}
  parallel: {model_parallel_size: 1, tensor_parallel_size: 1, tensor_parallel_rank: 1}
optimizer: {learning_rate: 5e-5}
"""
DECEMBER_YAML = """
train_data_path: data.jsonl
tokenizer_path: ./tokenizer
max_length: 96
learning_rate: "1e-4"
api_key: secret
vocab_size: 31
hidden_size: 48
num_hidden_layers: 2
num_attention_heads: 8
num_key_value_heads: 2
intermediate_size: null
rope_theta: 500.0
rms_norm_eps: "1e-3"
dropout: 0.1
use_moe: false
"""


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    return saved(tmp_path / "seed.safetensors", seed_state())


@pytest.fixture
def december(tmp_path: Path) -> Path:
    return saved(tmp_path / "december.safetensors", december_state())


def settings(path: Path, config: Path) -> ByteConfig:
    return from_original(path, config=config).model.config


def refused(path: Path, config: Path) -> str:
    with pytest.raises(ValueError) as caught:
        from_original(path, config=config)
    assert is_one_line(caught.value)
    return str(caught.value)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message.partition(": ")[2] for record in caplog.records]


def test_a_whole_config_of_the_seed(seed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    values = PretrainedConfig().to_dict() | {"is_decoder": False, "pruned_heads": {}, "temperature": 1.0}
    values |= SEED_REST | SEED | {"drop_path_prob": 0.3, "hidden_dropout_prob": 0.2, "attention_dropout_prob": 0.05}
    values |= {"residual_dropout_prob": 0.15, "initializer_range": 0.01, "layerscale_init": 0.5, "max_seq_len": 64}
    config = settings(seed, saved_config(tmp_path / "c.json", **values))
    assert config == ByteConfig(
        vocab_size=29,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        max_position_embeddings=64,
        position_embedding="stellarbyte",
        xpos_learnable=True,
        xpos_scale_base=512.0,
        mlp_style="stellarbyte",
        rms_norm_eps=1e-5,
        rms_norm_eps_rule="clamp",
        residual_scaling="branch",
        layer_scale_init=0.5,
        drop_path=0.3,
        initialization="stellarbyte",
        initializer_range=0.01,
        attention_dropout=0.05,
        hidden_dropout=0.2,
        residual_dropout=0.15,
    )
    (line,) = told(caplog)
    assert line.startswith("without effect on the network here: ")
    assert set(line.partition(": ")[2].split(", ")) == {
        *("dim_multiplier", "use_flash_attention", "use_cache", "key_cache_dtype", "value_cache_dtype"),
        *("model_parallel_size", "tensor_parallel_size", "tensor_parallel_rank"),
        *("is_decoder", "pruned_heads", "temperature"),
    }


def test_a_whole_config_of_december(december: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    values = PretrainedConfig().to_dict() | DECEMBER_REST | DECEMBER | {"dropout": 0.1, "initializer_range": 0.01}
    config = settings(december, saved_config(tmp_path / "c.json", **values))
    assert config == ByteConfig(
        vocab_size=31,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=20,
        max_position_embeddings=32768,
        rope_theta=1e6,
        initializer_range=0.01,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        residual_dropout=0.1,
    )
    (line,) = told(caplog)
    assert all(name in line for name in ("flash_attn", "eos_token_id", "n_routed_experts", "norm_topk_prob"))


def test_sizes_that_a_config_leaves_to_the_original(tmp_path: Path) -> None:
    """Derived widths: four times the model's at the seed, two thirds of that in blocks of 128 in December."""
    path = saved(tmp_path / "a.safetensors", seed_state(hidden_dim=96, num_kv_heads=4))
    config = saved_config(tmp_path / "a.json", **(SEED | {"hidden_dim": None, "num_kv_heads": None}))
    assert settings(path, config).mlp_size == 96
    path = saved(tmp_path / "b.safetensors", december_state(hidden_size=96, intermediate_size=256))
    config = saved_config(tmp_path / "b.json", **(DECEMBER | {"hidden_size": 96, "intermediate_size": None}))
    assert settings(path, config).intermediate_size == 256


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "causal": ("seed", {"use_causal": False}, "use_causal is False: every token would see those after it"),
    "experts": ("december", {"use_moe": True}, "use_moe is True: this network has no mixture of experts"),
    "yarn": ("december", {"inference_rope_scaling": True}, "that is a YaRN of the original's own"),
    "yarn table": ("december", {"rope_scaling": {"type": "yarn"}}, "which the original sets by inference_rope_scaling"),
    "yarn type": ("december", {"inference_rope_scaling": 1}, "inference_rope_scaling must be true or false, got 1"),
    "deepnorm type": ("seed", {"use_deepnorm": None}, "use_deepnorm is null: give a value"),
    "deepnorm number": ("seed", {"use_deepnorm": 1}, "use_deepnorm must be true or false, got 1"),
    "other name": ("seed", {"num_kv_head": 2}, "num_kv_head (did you mean num_kv_heads?): the original reads no such"),
    "null": ("seed", {"model_dim": None}, "model_dim is null: give a value, or remove the field for the default"),
    "type": ("seed", {"model_dim": "wide"}, "c.json: model_dim must be int (positive, below 2^31), got 'wide'"),
    "activation": ("december", {"hidden_act": "relu"}, "hidden_act is 'relu'; supported are silu"),
    "sizes": ("seed", {"model_dim": 32}, "embed_tokens.weight has shape (29, 24), the settings ask for (29, 32)"),
    "width": ("december", {"hidden_size": "wide", "intermediate_size": None}, "hidden_size must be int (positive"),
    "length": (
        "december",
        {"inference_rope_scaling": True, "max_position_embeddings": "long"},
        "that is a YaRN of the original's own",
    ),
    "nine": ("seed", {f"zzz{i}": 0 for i in range(9)}, "zzz7: the original reads no such field; remove it; and 1 more"),
    "layers": ("december", {"num_hidden_layers": 3}, "missing model.layers.2.input_layernorm.weight"),
    "class": ("seed", {"model_type": "llama"}, "model_type is 'llama', and the checkpoint has the layout seed"),
    "several": (
        "seed",
        {"use_causal": False, "experts": 8, "vocab_size": None},
        "set it to true; experts: the original reads no such field; remove it; vocab_size is null",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_counterpart_is_refused_by_name(name: str, tmp_path: Path) -> None:
    layout, change, message = REFUSALS[name]
    state, base = (seed_state(), SEED) if layout == "seed" else (december_state(), DECEMBER)
    path, config = saved(tmp_path / "x.safetensors", state), saved_config(tmp_path / "c.json", **(base | change))
    assert message in refused(path, config)


def test_what_is_without_a_config_is_told_by_its_value(december: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    from_original(december)
    (line,) = told(caplog)
    assert "other settings the original's defaults (" in line and "rope_theta 1000000.0" in line and "None" not in line


def test_a_config_may_leave_its_class_empty(seed: Path, tmp_path: Path) -> None:
    plain = settings(seed, saved_config(tmp_path / "a.json", **SEED))
    assert settings(seed, saved_config(tmp_path / "b.json", **SEED, model_type="")) == plain


def test_a_part_of_a_trainers_config_that_is_null_says_nothing(seed: Path, tmp_path: Path) -> None:
    (tmp_path / "c.YAML").write_text("model: {max_seq_len: 64, norm: null, dropout: {hidden_dropout_prob: 0.2}}")
    config = settings(seed, tmp_path / "c.YAML")
    assert (config.max_position_embeddings, config.hidden_dropout, config.rms_norm_eps) == (64, 0.2, 1e-5)


def test_one_setting_of_decembers_trainer_is_enough_to_know_it(december: Path, tmp_path: Path) -> None:
    for name in ("train_data_path", "learning_rate", "tokenizer_path"):
        (tmp_path / "c.json").write_text(json.dumps({name: "x", "max_length": 96}))
        assert settings(december, tmp_path / "c.json").max_position_embeddings == 96


def test_stretching_within_the_trained_length_changes_nothing(december: Path, tmp_path: Path) -> None:
    values = DECEMBER | {"inference_rope_scaling": True, "rope_scaling": {"type": "yarn"}}
    values |= {"max_position_embeddings": 2048}
    config = settings(december, saved_config(tmp_path / "c.json", **values))
    assert (config.rope_scaling.name, config.max_position_embeddings) == ("none", 2048)


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_config_of_the_seeds_trainer(form: str, seed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It ignored sizes of its file, so those of the tensors hold; it raised the vocabulary to the tokenizer's."""
    import yaml

    caplog.set_level(logging.WARNING)
    text = SEED_YAML if form == "yaml" else json.dumps(yaml.safe_load(SEED_YAML.replace("1e-3", "0.001")))
    (tmp_path / f"c.{form}").write_text(text)
    config = settings(seed, tmp_path / f"c.{form}")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (29, 24, 2)
    assert (config.num_attention_heads, config.kv_heads, config.mlp_size) == (4, 2, 20)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.hidden_dropout) == (128, 1e-3, 0.2)
    assert (config.rope_theta, config.xpos_scale_base) == (500.0, 64.0)
    assert told(caplog) == [
        "settings of a training, which are not imported: experiment, training, optimizer",
        "use_causal is not the file's but True: the original's trainer did not read it",
        "without effect on the network here: dim_multiplier, use_flash_attention, use_cache, key_cache_dtype, "
        "value_cache_dtype, model_parallel_size, tensor_parallel_size, tensor_parallel_rank",
        "sizes are those of the tensors, not those of the file: vocab_size 29, model_dim 24, num_layers 2, "
        "num_attention_heads 4, num_kv_heads 2",
    ]
    assert "secret" not in caplog.text


def test_a_config_of_decembers_trainer(december: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "c.yml").write_text(DECEMBER_YAML)
    config = settings(december, tmp_path / "c.yml")
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope_theta) == (96, 1e-3, 1e6)
    assert (config.hidden_size, config.intermediate_size, config.hidden_dropout) == (32, 20, 0.1)
    assert told(caplog) == [
        "settings of a training, which are not imported: train_data_path, tokenizer_path, max_length, learning_rate, "
        "api_key",
        "rope_theta is not the file's but 1000000.0: the original's trainer did not read it",
        "sizes are those of the tensors, not those of the file: hidden_size 32",
    ]
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold named settings, got NoneType"),
        ("- 1", "must hold named settings, got list"),
        ("a: [", "is not valid YAML: while parsing"),
        ("a: &x [1]\nb: *x", "uses YAML aliases"),
        ("model_dim: 1\nmodel_dim: 2", "'model_dim' is given twice"),
        ("[1]: 2", "a key on line 1 is no name"),
        ("a: " + "[" * 5000, "is nested too deeply: copy the file again"),
        ("a: \x00", "is not valid YAML"),
        ("model_dim: !!python/object/apply:os.getcwd []", "model_dim must be int"),
        ("model_dim: !!int x", "model_dim must be int"),
        ("model_dim: " + "9" * 5000, "model_dim must be int"),
        (
            "model: {dim: 3}\ntrainig: {}",
            "trainig (did you mean training?): the original's trainer has no such section",
        ),
        ("model: {dropout: 3}", "a part of the section model is 3, not named settings"),
        ("model: {dim: 3, norm: {dim: 4}}", "the section model gives model_dim twice"),
        ("learning_rate: 1", "is a config of the trainer of layout december, and the checkpoint has the layout seed"),
    ],
)
def test_yaml_that_is_no_config(text: str, message: str, seed: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert message in refused(seed, tmp_path / "c.yaml")


def test_files_that_are_no_config(seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in refused(seed, tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    assert "c.json is not valid JSON" in refused(seed, tmp_path / "c.json")
    (tmp_path / "c.yaml").write_text("model_dim: 3")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="needs PyYAML: pip install pyyaml, or write the settings as JSON"):
        from_original(seed, config=tmp_path / "c.yaml")

"""``config.json`` read and written: defaults and activations of transformers, and fields that may not be ignored."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, SMALL, small_config

from stellarbyte_jax.config import ByteConfig, RopeScaling
from stellarbyte_jax.hf.families import FAMILIES, LLAMA, MISTRAL
from stellarbyte_jax.hf.rope import ROPE_NAMES
from stellarbyte_jax.hf.settings import config_json, generation_json, parse_config, read_config
from stellarbyte_jax.hf.table import Family
from stellarbyte_jax.ops.activations import ACTIVATIONS

THEIRS = [family for family in FAMILIES.values() if family.modelling_file is None]
LLAMA_FILE = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 96}
MISTRAL_FILE = LLAMA_FILE | {"model_type": "mistral", "num_key_value_heads": 2}


def config(**values: Any) -> ByteConfig:
    return parse_config(LLAMA_FILE | values, "here")[1]


def test_a_directory_says_its_family_and_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_FILE | {"architectures": ["LlamaForCausalLM"]}))
    family, found = read_config(tmp_path)
    assert family is LLAMA
    assert (found.hidden_size, found.num_attention_heads, found.vocab_size) == (32, 4, 96)
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_FILE | {"sliding_window": 9}))
    family, found = read_config(tmp_path)
    assert family is MISTRAL
    assert (found.sliding_window, found.kv_heads) == (9, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, f"model_type is 'gpt2'; supported are {', '.join(FAMILIES)}$"),
        ({"model_type": None}, f"model_type is None; supported are {', '.join(FAMILIES)}$"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"architectures is \['LlamaForSequenceClassification'\]; supported is LlamaForCausalLM$",
        ),
        (
            MISTRAL_FILE | {"architectures": ["LlamaForCausalLM"]},
            r"architectures is \['LlamaForCausalLM'\]; supported is MistralForCausalLM$",
        ),
        (
            {"hidden_act": "relu"},
            "hidden_act is 'relu'; supported are silu, swish, gelu, gelu_python, gelu_pytorch_tanh, gelu_new$",
        ),
        (MISTRAL_FILE | {"attention_bias": True}, "attention_bias is True; only False is implemented$"),
        (MISTRAL_FILE | {"mlp_bias": True}, "mlp_bias is True; only False is implemented$"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; only 1 is implemented$"),
        ({"rope_interleaved": True}, "rope_interleaved is True; only False is implemented$"),
        ({"intermediate_size": None}, "intermediate_size is null: give a value, or remove the field for the default$"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported are llama, "),
        ({"architectures": 3}, "architectures must be a list of names, got 3$"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names, got 'LlamaForCausalLM'$"),
        ({"attention_dropout": []}, r"ByteConfig.attention_dropout must be float \(in \[0, 1\)\), got \(\)$"),
        ({"attention_dropout": None}, "attention_dropout is null: give a value, or remove the field for the default$"),
        ({"attention_bias": None}, "attention_bias is null: give a value, or remove the field for the default$"),
        (
            MISTRAL_FILE | {"num_key_value_heads": None},
            "num_key_value_heads is null: give a value, or remove the field for the default$",
        ),
        ({"rope_theta": None}, "rope_theta is null: give a number, or remove the field for the default$"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config: not implemented for llama, nor known to be without effect. The weights are "
            r"quantized: save them dequantized, as dequantize\(\) of transformers does$",
        ),
        (
            {"auto_map": {}},
            "auto_map: not implemented for llama, .* The directory has a modelling file .* ordinary llama$",
        ),
        ({"residual_scale": 4}, "residual_scale: .* computes the same without it, remove it from config.json$"),
        ({"logit_softcapping": 4}, "logit_softcapping: not implemented for llama"),
        ({"versions": 4}, "versions: not implemented for llama"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads is \{'0': \[1\]\}; only \{\} is implemented$"),
        ({"add_cross_attention": True}, "add_cross_attention is True; only False is implemented$"),
        ({"sliding_window": 4}, "sliding_window: not implemented for llama"),
        ({"hidden_sise": 4}, r"hidden_sise \(did you mean hidden_size\?\): not implemented for llama"),
        ({"qqqq": 0, "zzzz": False, "wwww": None}, "qqqq, zzzz: not implemented for llama"),
        ({"num_attention_heads": 3}, "hidden_size 32 is not divisible by num_attention_heads 3: change one of them"),
        ({"vocab_size": "many"}, r"ByteConfig.vocab_size must be int \(positive, below 2.(31|63)\), got 'many'$"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'$"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_expressed_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_FILE | changes))
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_config(tmp_path)


def test_fields_without_effect_and_fields_that_are_null_are_ignored() -> None:
    harmless = {"use_cache": False, "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "float16", "dtype": "x"}
    switched_off = {"quantization_config": None, "sliding_window": None, "architectures": None}
    fixed = {"pretraining_tp": 1, "rope_interleaved": False}
    assert config(**harmless, **switched_off, **fixed) == config()
    assert config(**{"transformers.js_config": {"dtype": "q4"}, "is_llama_config": True, "unk_token_id": 0}) == config()
    biases = {"attention_bias": None, "mlp_bias": None}  # MistralConfig has no such fields
    assert parse_config(MISTRAL_FILE | biases, "here") == parse_config(MISTRAL_FILE, "here")


def test_a_whole_config_of_transformers_4_is_read() -> None:
    """As ``to_dict`` gives it, and programs that do not leave out defaults write it; named by its release 4.57."""
    whole = {"is_decoder": False, "is_encoder_decoder": False, "cross_attention_hidden_size": None, "prefix": None}
    whole |= {"add_cross_attention": False, "tie_encoder_decoder": False, "pruned_heads": {}, "_commit_hash": None}
    whole |= {"torchscript": False, "use_bfloat16": False, "tf_legacy_loss": False, "chunk_size_feed_forward": 0}
    whole |= {"max_length": 20, "num_beams": 1, "temperature": 1.0, "typical_p": 1.0, "top_k": 50, "top_p": 1.0}
    whole |= {"bad_words_ids": None, "begin_suppress_tokens": None, "return_dict": True, "output_scores": False}
    whole |= {"id2label": {"0": "LABEL_0"}, "problem_type": None, "finetuning_task": None, "sep_token_id": None}
    assert config(**whole) == config()
    assert config(_commit_hash="0123abcd", gradient_checkpointing=True) == config()


def test_the_first_llama_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """Its converters wrote another name of the class, and a length that nothing reads."""
    first = {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "pad_token_id": -1, "use_cache": True}
    assert config(**first) == config()
    assert "without effect on the logits: max_sequence_length" in caplog.text


def test_fields_of_sampling_and_of_trainers_are_told(caplog: pytest.LogCaptureFixture) -> None:
    written = {"unsloth_version": "2026.1", "temperature": 0.7, "max_length": 4096, "unsloth_fixed": True}
    written |= {"peft_version": "0.18"}
    assert config(**written, top_p=None) == config()
    assert caplog.messages == [
        "here: without effect on the logits: unsloth_version, temperature, max_length, unsloth_fixed, peft_version"
    ]


def test_a_field_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(LLAMA_FILE)
    (tmp_path / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": 64, "hidden_size": 32'))
    with pytest.raises(
        ValueError, match=r"config\.json gives two values for the key 'hidden_size', 64 and 32: keep one"
    ):
        read_config(tmp_path)


# Fields of which one value is implemented, which many files state.
FIXED: dict[str, dict[str, Any]] = {
    "llama": {"pretraining_tp": 1, "rope_interleaved": False},
    "mistral": {"pretraining_tp": 1, "rope_interleaved": False, "attention_bias": False, "mlp_bias": False},
    "qwen2": {"pretraining_tp": 1, "rope_interleaved": False, "mlp_bias": False},
    "qwen3": {"pretraining_tp": 1, "rope_interleaved": False, "mlp_bias": False},
    "mixtral": {"pretraining_tp": 1, "rope_interleaved": False, "attention_bias": False, "mlp_bias": False},
    "qwen3_moe": {"pretraining_tp": 1, "rope_interleaved": False, "mlp_bias": False},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "partial_rotary_factor": 1.0}
    | {"attention_bias": False, "mlp_bias": False},
}


@pytest.mark.parametrize("name", FIXED)
def test_the_one_value_that_is_implemented_may_be_stated(name: str) -> None:
    plain = SMALL | {"model_type": name}
    assert parse_config(plain | FIXED[name], "here") == parse_config(plain, "here")
    for field, value in FIXED[name].items():
        other = not value if isinstance(value, bool) else value + 0.5
        with pytest.raises(ValueError, match=f"^here: {field} is {other}; only {value} is implemented$"):
            parse_config(plain | {field: other}, "here")


def test_one_of_several_architectures_is_enough() -> None:
    assert config(architectures=["LlamaForSequenceClassification", "LlamaForCausalLM"]) == config()


def test_phi3_says_the_length_it_was_trained_with() -> None:
    """Readers of other programs refuse it without."""
    written = config_json(FAMILIES["phi3"], small_config(), "float32", {})
    assert written["original_max_position_embeddings"] == written["max_position_embeddings"] == 64


def test_biases_of_llama_are_two_settings_here() -> None:
    def biases(**values: Any) -> tuple[bool, bool, bool]:
        found = config(**values)
        return found.attention_bias, found.attention_output_bias, found.mlp_bias

    assert biases() == (False, False, False)
    assert biases(attention_bias=True) == (True, True, False)
    assert biases(mlp_bias=True) == (False, False, True)


def test_absent_settings_are_the_familys_defaults() -> None:
    llama = parse_config({"model_type": "llama"}, "here")[1]
    found = (llama.intermediate_size, llama.rms_norm_eps, llama.kv_heads, llama.sliding_window)
    assert found == (11008, 1e-6, 32, None)
    mistral = parse_config({"model_type": "mistral"}, "here")[1]
    assert (mistral.intermediate_size, mistral.kv_heads, mistral.sliding_window) == (14336, 8, 4096)
    assert parse_config({"model_type": "mistral", "sliding_window": None}, "here")[1].sliding_window is None


def test_the_defaults_are_those_of_transformers() -> None:
    pytest.importorskip("torch", reason="transformers' model configs are compared where the peer exists")
    import transformers

    derived = {"num_key_value_heads": None, "head_dim": None}
    names = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Mixtral", "Qwen3Moe")
    plain = [(getattr(transformers, f"{name}Config")(), {}) for name in names]
    assert {theirs.model_type for theirs, _ in plain} == {family.model_type for family in THEIRS}
    for theirs, stated in (*plain, (transformers.LlamaConfig(**derived), derived)):
        spelt = parse_config(theirs.to_dict(), "here")[1]
        short = parse_config({"model_type": theirs.model_type} | stated, "here")[1]
        sizes = {"num_key_value_heads": short.kv_heads, "head_dim": spelt.head_dim and short.head_size}
        assert short.to_dict() | sizes == spelt.to_dict()


NULLABLE = [(f, name) for f in THEIRS for name in (*f.defaults, *f.fixed, *ROPE_NAMES, "architectures")]


@pytest.mark.parametrize(("family", "name"), NULLABLE, ids=lambda x: x if isinstance(x, str) else x.model_type)
def test_null_means_what_it_means_to_transformers_or_is_refused(tmp_path: Path, family: Family, name: str) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoConfig, AutoModelForCausalLM

    values = SMALL | {"model_type": family.model_type, "num_hidden_layers": 1, "pad_token_id": 0, name: None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    try:
        theirs = AutoConfig.from_pretrained(tmp_path)
        for mode in (True, False):  # a null attention_dropout of Llama is refused in training alone
            AutoModelForCausalLM.from_config(theirs).train(mode)(torch.zeros((1, 3), dtype=torch.long))
    except Exception:  # in any way that Python, torch or the library can refuse
        with pytest.raises(ValueError, match=f"config.json: {name} is null: give "):
            read_config(tmp_path)
        return
    ours = read_config(tmp_path)[1]
    head_size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    sizes = (theirs.num_key_value_heads, head_size, getattr(theirs, "sliding_window", None))
    assert (ours.kv_heads, ours.head_size, ours.sliding_window) == sizes
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling == RopeScaling()
    assert (ours.attention_dropout, ours.mlp_size) == (theirs.attention_dropout, theirs.intermediate_size)


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_new"])
def test_activations_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype="f4")
    ours = ACTIVATIONS[config(hidden_act=name).hidden_act](jax.device_put(x))
    np.testing.assert_allclose(np.asarray(ours), ACT2FN[name](torch.from_numpy(x)).numpy(), atol=2e-6)


def test_what_is_written_names_every_size() -> None:
    ours = small_config(num_key_value_heads=None, intermediate_size=None, rms_norm_eps=1e-3, tie_word_embeddings=True)
    assert config_json(LLAMA, ours, "bfloat16", {"bos_token_id": 1, "eos_token_id": [2, 3]}) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
    }


def test_a_window_is_written_for_mistral_alone() -> None:
    written = config_json(MISTRAL, small_config(sliding_window=7, vocab_size_multiple=64), "float32", {})
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert (written["sliding_window"], written["vocab_size"]) == (7, 96)
    alike = small_config(sliding_window=7, layer_types=("sliding_attention",) * 3)
    assert config_json(MISTRAL, alike, "float32", {})["sliding_window"] == 7
    full = small_config(layer_types=("full_attention",) * 3)
    assert config_json(MISTRAL, full, "float32", {})["sliding_window"] is None
    assert config_json(MISTRAL, small_config(), "float32", {})["sliding_window"] is None
    assert "sliding_window" not in config_json(LLAMA, small_config(), "float32", {})


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 16},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "attention_dropout": 0.1},
        {"rope_theta": 777.0, "rope_scaling": RopeScaling(name="llama3", factor=2.0)},
        {"sliding_window": 7, "hidden_act": "gelu", "initializer_range": 0.5, "rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_transformers_reads_what_is_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    import transformers

    ours = small_config(**settings)
    family = MISTRAL if ours.sliding_window else LLAMA
    (tmp_path / "config.json").write_text(json.dumps(config_json(family, ours, "float16", {"pad_token_id": 3})))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.model_type, theirs.architectures) == (family.model_type, [family.architecture])
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    same += ("hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_dropout", "initializer_range")
    assert {name: getattr(theirs, name) for name in same} == {name: getattr(ours, name) for name in same}
    assert (theirs.num_key_value_heads, theirs.head_dim, theirs.intermediate_size) == (2, ours.head_size, 56)
    assert getattr(theirs, "attention_bias", False) == ours.attention_bias == ours.attention_output_bias
    assert getattr(theirs, "mlp_bias", False) == ours.mlp_bias
    assert getattr(theirs, "sliding_window", None) == ours.sliding_window
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if "rope_scaling" in settings else "default")
    assert str(theirs.dtype).removeprefix("torch.") == "float16"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, None, 3)


def test_where_generation_begins_and_ends() -> None:
    ids = {"eos_token_id": [2, 3], "pad_token_id": 0, "unk_token_id": 4}
    assert generation_json(ids) == {"bos_token_id": None, "eos_token_id": [2, 3], "pad_token_id": 0}

"""The network's settings: what they derive, and which contradict each other."""

import dataclasses

import pytest
from helpers.variants import BASE

from stellarbyte_jax.config import ByteConfig, ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, "hidden_size 100 is not divisible by .* 12"),
        ({"num_attention_heads": 12, "num_key_value_heads": 5}, "12 is not divisible by .* 5"),
        ({"num_attention_heads": 12, "num_key_value_heads": 24}, "12 is not divisible by .* 24"),
        ({"hidden_size": 36, "num_attention_heads": 12}, "head size must be even .* got 3"),
        ({"hidden_size": 0}, r"ByteConfig\.hidden_size must be int \(positive, below 2.(31|63)\), got 0"),
        ({"hidden_size": 768.0}, r"ByteConfig\.hidden_size must be int"),
        ({"hidden_size": 2**31}, r"ByteConfig\.hidden_size must be int \(positive, below 2\^31\), got 2147483648"),
        ({"num_hidden_layers": 2**63}, r"num_hidden_layers must be int \(positive, at most 4096\), got 9223"),
        ({"rope_theta": 10**400}, r"rope_theta must be float \(positive, finite\), got 1000.* \.\.\. 0+$"),
        ({"hidden_size": True}, r"ByteConfig\.hidden_size must be int"),
        ({"hidden_sizes": 3}, "no setting 'hidden_sizes'; did you mean hidden_size"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers is 12"),
        ({"memory": {"length": [4, 4]}}, r"^memory\.length names 2 layers, num_hidden_layers is 12$"),
        (
            {"num_hidden_layers": 1, "layer_types": ["windowed"]},
            "^layer_types may hold full_attention, sliding_attention, got windowed$",
        ),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "give sliding_window"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ByteConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel_residual": True, "residual_scaling": "deepnorm"}, "one branch after the other"),
        ({"residual_scaling": "deepnorm", "initialization": "depth"}, "its own initialisation"),
        ({"xpos_learnable": True}, "no rates to learn"),
        ({"position_embedding": "stellarbyte", "rope_pairing": "interleaved"}, "a pairing of its own"),
        ({"mlp_style": "stellarbyte", "hidden_act": "gelu"}, "a gate of its own"),
        ({"sink_tokens": 4}, "give sliding_window"),
        ({"rope_scaling": {"factor": 2.0}}, "name one of linear"),
        ({"rope_scaling": {"name": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"name": "linear"}}, "name=linear with factor 1 changes nothing: give rope_scaling.factor"),
        ({"rope_scaling": {"name": "yarn"}}, "name=yarn with factor 1 changes nothing"),
        ({"sliding_window": 4, "layer_types": ("full_attention",) * 4}, "layer_types names none: leave it out"),
        ({"rope_scaling": {"name": "linear", "original_max_position_embeddings": 9}}, "belongs to yarn and llama3"),
        ({"rope_scaling": {"name": "linear", "factor": 2.0, "beta_fast": 8.0}}, "beta_fast belongs to yarn, "),
        ({"rope_scaling": {"name": "yarn", "factor": 2.0, "low_freq_factor": 2.0}}, "belongs to llama3, "),
        ({"rope_scaling": {"name": "yarn", "factor": 2.0, "beta_fast": 1.0}}, "must be above beta_slow"),
        ({"xpos_scale_base": 64.0}, "plain RoPE does not decay"),
        ({"memory": {"length": 8, "compression_weight": 0.5}}, "recent_share below 1"),
        ({"memory": {"length": 8}, "sliding_window": 4}, "leave out sliding_window"),
        ({"memory": {"length": (8, 8)}}, "num_hidden_layers is 4"),
        ({"memory": {"length": 8}, "rope_scaling": {"name": "dynamic", "factor": 2.0}}, "distances alone"),
        ({"memory": {"length": 8}, "cache": {"heavy_hitters": 1, "recent": 1}}, "cannot be used with memory"),
        ({"memory": {"length": 8, "recent_share": 0.0}}, "no slot for the newest"),
        ({"memory": {"compression_weight": 0.5}}, "memory.length is 0"),
        ({"cache": {"recent": 8}}, "belong together, got none and 8$"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **settings)


def test_the_originals_names_are_aliases():
    original = {"model_dim": 96, "num_layers": 3, "n_heads": 6, "num_kv_heads": 2, "hidden_dim": 100, "max_seq_len": 64}
    config = ByteConfig.from_dict(original)
    assert config == ByteConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=100,
        max_position_embeddings=64,
    )
    with pytest.raises(ConfigError, match=r"ByteConfig\.hidden_size is given twice: once as 'dim'"):
        ByteConfig.from_dict({"hidden_size": 96, "dim": 96})


def test_derived_sizes():
    config = ByteConfig(hidden_size=96, num_attention_heads=6, num_hidden_layers=2)
    assert (config.kv_heads, config.head_size, config.mlp_size, config.windows) == (6, 16, 384, (None, None))
    config = dataclasses.replace(config, num_key_value_heads=2, head_dim=32, intermediate_size=100, sliding_window=7)
    assert (config.kv_heads, config.head_size, config.mlp_size, config.windows) == (2, 32, 100, (7, 7))
    config = dataclasses.replace(config, layer_types=("full_attention", "sliding_attention"))
    assert config.windows == (None, 7)

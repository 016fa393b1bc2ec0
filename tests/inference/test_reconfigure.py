"""Other settings for a loaded model: lengths that scaling counts from, and settings that weights do not allow."""

import pytest

from stellarbyte_jax.config import ByteConfig, CacheConfig, ConfigError, RopeScaling
from stellarbyte_jax.inference.reconfigure import reconfigure
from stellarbyte_jax.model.decoder import ByteTransformer

BASE = ByteConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    compute_dtype="float32",
)
TINY = ByteTransformer(BASE)


def changed(*overrides, model=TINY):
    return reconfigure(model, overrides).config


def lengths(config):
    return config.rope_scaling.original_max_position_embeddings, config.max_position_embeddings


def test_without_settings_it_is_the_model_itself():
    assert reconfigure(TINY, []) is TINY


def test_settings_are_applied_together_and_nothing_else_changes():
    found = changed(
        "sliding_window=9", "layer_types=full_attention,sliding_attention", "sink_tokens=2", "cache.dtype=int8"
    )
    assert found == ByteConfig.from_dict(
        BASE.to_dict()
        | {
            "sliding_window": 9,
            "layer_types": ("full_attention", "sliding_attention"),
            "sink_tokens": 2,
            "cache": CacheConfig(dtype="int8").to_dict(),
        }
    )
    assert BASE.sliding_window is None


@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_scaling_counts_from_the_trained_length(name):
    scaled = [f"rope_scaling.name={name}", "rope_scaling.factor=4"]
    assert lengths(changed(*scaled)) == (64, 256)
    assert lengths(changed(*reversed(scaled))) == (64, 256)
    assert lengths(changed(*scaled, "max_position_embeddings=128")) == (64, 128)
    assert lengths(changed(*scaled, "rope_scaling.original_max_position_embeddings=32")) == (32, 64)
    assert lengths(changed(f"rope_scaling.name = {name}", "rope_scaling.factor=1.7")) == (64, 108)
    whole = "rope_scaling.original_max_position_embeddings = none"
    assert lengths(changed(*scaled, whole)) == (None, 64)
    assert lengths(changed(*scaled, whole, "max_position_embeddings=128")) == (None, 128)


def test_a_model_that_is_scaled_already_keeps_its_lengths():
    scaled = ByteTransformer(changed("rope_scaling.name=yarn", "rope_scaling.factor=4"))
    assert lengths(changed("rope_scaling.factor=2", model=scaled)) == (64, 256)
    assert lengths(changed("rope_scaling.name=llama3", model=scaled)) == (64, 256)
    as_saved = {"rope_scaling": RopeScaling(name="yarn", factor=4.0).to_dict()}
    whole = ByteTransformer(ByteConfig.from_dict(BASE.to_dict() | as_saved))
    assert lengths(changed("rope_scaling.beta_fast=16", model=whole)) == (None, 64)


@pytest.mark.parametrize("name", ["linear", "dynamic"])
def test_other_scaling_stretches_the_length_by_itself(name):
    assert lengths(changed(f"rope_scaling.name={name}", "rope_scaling.factor=4")) == (None, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["hidden_size=32"],
            r"hidden_size=32 asks .* \(embed/embedding: \[61, 16\] becomes \[61, 32\]\): leave it out",
        ),
        (["qk_norm=true"], r"qk_norm=true asks .* \(layers/0/attn/k_norm/scale: nothing becomes \[2, 8\]\)"),
        (["tie_word_embeddings=true"], r"\(lm_head/kernel: \[16, 61\] becomes nothing\)"),
        (["num_hidden_layers=3"], r"\[2, 16, 2, 8\] becomes \[3, 16, 2, 8\]"),
        (["cache.dtype=int8", "vocab_size=62", "sliding_window=4"], r"^vocab_size=62 asks for other weights"),
        (["qk_norm=true", "sink_tokens=0", "vocab_size=62"], "^qk_norm=true vocab_size=62 asks"),
        (["position_embedding=xpos", "xpos_learnable=true"], "^position_embedding=xpos xpos_learnable=true asks"),
        (
            ["cache.dtype=int8", "position_embedding=xpos", "rope_theta=5", "xpos_learnable=true"],
            "^position_embedding=xpos xpos_learnable=true asks",
        ),
        (
            ["xpos_learnable=true", "qk_norm=true", "sliding_window=4", "position_embedding=xpos", "sink_tokens=2"],
            "^xpos_learnable=true qk_norm=true position_embedding=xpos asks",
        ),
        (["num_attention_heads=3", "sink_tokens=0", "head_dim=8"], "^num_attention_heads=3 head_dim=8 asks"),
    ],
)
def test_other_weights_are_refused_by_the_setting_that_asks_for_them(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        reconfigure(TINY, overrides)
    assert "such settings are chosen before training" in str(caught.value) and "\n" not in str(caught.value)


WITH_EXPERTS = ByteTransformer(
    ByteConfig.from_dict(BASE.to_dict() | {"moe": {"num_experts": 4, "num_experts_per_tok": 2}})
)


def test_tokens_may_go_to_other_experts():
    found = changed(
        "moe.num_experts_per_tok=3",
        "moe.dynamic_k=0.5",
        "moe.scoring_func=sigmoid",
        "moe.temperature=0.5",
        "moe.dispatch=capacity",
        "moe.noise=gumbel",
        "sliding_window=9",
        model=WITH_EXPERTS,
    )
    m = found.moe
    assert (m.num_experts, m.num_experts_per_tok, m.dynamic_k, m.scoring_func) == (4, 3, 0.5, "sigmoid")
    assert (m.temperature, m.dispatch, m.noise, found.sliding_window) == (0.5, "capacity", "gumbel", 9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["moe.dynamic_k=0.5", "moe.num_experts=8"], r"^moe.num_experts=8 asks .*: \[2, 4, 64, 16\] becomes"),
        (["moe.noise=noisy_topk"], r"^moe.noise=noisy_topk asks .*router/noise: nothing becomes \[2, 16, 4\]"),
        (["moe.adaptive_temperature=true"], r"^moe.adaptive_temperature=true asks .*router/temperature: nothing"),
        (["moe.mlp_only_layers=[0]"], r"^moe.mlp_only_layers=\[0\] asks for other weights"),
        (["moe.shared_pool=true"], "^moe.shared_pool=true asks for other weights"),
    ],
)
def test_other_experts_are_refused_by_the_setting_that_asks_for_them(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        reconfigure(WITH_EXPERTS, overrides)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^moe.num_experts=4 asks for other weights"):
        reconfigure(TINY, ["moe.num_experts=4"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["windw=3"], "setting 'windw=3': there is no setting 'windw'"),
        (["sliding_window"], "setting 'sliding_window': expected section.name=value"),
        (["sink_tokens=4"], "give sliding_window, or leave sink_tokens out"),
        (
            ["sliding_window=many"],
            r"setting sliding_window=many: sliding_window must be int \(positive, below 2.(31|63)\) or none",
        ),
        (["rope_scaling.name=yarn", "rope_scaling.factor=0.5"], "rope_scaling.factor must be at least 1, got 0.5"),
    ],
)
def test_settings_that_do_not_exist_or_contradict_others_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        reconfigure(TINY, overrides)

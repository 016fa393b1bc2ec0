"""Both layouts against the original's networks in numpy, written from their description."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_original import december_logits, seed_logits
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
from helpers.training import flat
from helpers.variants import run

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.original import from_original

TOKENS = np.random.default_rng(3).integers(0, 29, 12)
SEEDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "parallel": {"parallel_residual": True},
    "tied": {"tie_word_embeddings": True},
    "one-key-head": {"num_kv_heads": 1},
    "multi-head": {"num_kv_heads": 4},
    "no-branch-factor": {"use_deepnorm": False},
    # Here norms of small inputs are below eps, and factors are far from 1.
    "other-numbers": {"layer_norm_eps": 0.5, "xpos_scale_base": 8, "xpos_rope_theta": 37.0, "max_seq_len": 14},
}
DECEMBERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "other-numbers": {"rms_norm_eps": 0.5, "rope_theta": 50.0, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def logits(model: Any, params: Any) -> np.ndarray:
    return np.asarray(run(model, params, TOKENS[None].astype(np.int32)))[0]


@pytest.mark.parametrize("name", SEEDS)
def test_seed(name: str, tmp_path: Path) -> None:
    state, settings = seed_state(**SEEDS[name]), SEED | SEEDS[name]
    config = saved_config(tmp_path / "config.json", **(SEED_REST | settings))
    found = from_original(saved(tmp_path / "x.safetensors", state), config=config, compute_dtype="float32")
    expected = seed_logits(state, settings, TOKENS)
    assert found.layout.name == "seed" and np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(found.model, found.params), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DECEMBERS)
def test_december(name: str, tmp_path: Path) -> None:
    state, settings = december_state(**DECEMBERS[name]), DECEMBER | DECEMBERS[name]
    config = saved_config(tmp_path / "config.json", **(DECEMBER_REST | settings))
    found = from_original(saved(tmp_path / "x.safetensors", state), config=config, compute_dtype="float32")
    expected = december_logits(state, settings, TOKENS)
    assert found.layout.name == "december" and np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(found.model, found.params), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_and_defaults_stand_for_a_config(tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for make, expected, settings, told in (
        (seed_state, seed_logits, SEED, "max_seq_len 2048"),
        (december_state, december_logits, DECEMBER, "num_attention_heads 8"),
    ):
        caplog.clear()
        state = make(tie_word_embeddings=tied)
        found = from_original(saved(tmp_path / "x.safetensors", state), compute_dtype="float32")
        assert found.model.config.tie_word_embeddings == tied
        np.testing.assert_allclose(logits(found.model, found.params), expected(state, settings, TOKENS), atol=1e-4)
        (record,) = caplog.records
        assert "the original's defaults" in record.message and told in record.message


@pytest.mark.parametrize("kept", ["embedding", "head"])
def test_one_of_two_tied_tensors_is_enough(kept: str, tmp_path: Path) -> None:
    state = seed_state(tie_word_embeddings=True)
    expected = seed_logits(state, SEED, TOKENS)
    del state["lm_head.weight" if kept == "embedding" else "embed_tokens.weight"]
    found = from_original(saved(tmp_path / "x.safetensors", state), compute_dtype="float32")
    np.testing.assert_allclose(logits(found.model, found.params), expected, atol=1e-4)
    untied = saved_config(tmp_path / "config.json", **SEED)
    missing = "lm_head.weight" if kept == "embedding" else "embed_tokens.weight"
    with pytest.raises(ValueError, match=f"do not fit .*config.json: missing {missing}$"):
        from_original(tmp_path / "x.safetensors", config=untied)


def test_the_second_norm_of_a_parallel_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    config = saved_config(tmp_path / "config.json", **SEED, parallel_residual=True)
    from_original(saved(tmp_path / "x.safetensors", seed_state()), config=config)
    assert [r.message.partition(": ")[2] for r in caplog.records] == [
        "the network does not use layers.0.norm_ffn.weight, layers.1.norm_ffn.weight, with these settings"
    ]


def test_settings_and_dtypes(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", seed_state())
    found = from_original(path, dtype="bfloat16", vocab_size_multiple=8, compute_dtype="float32")
    assert found.params["embed"]["embedding"].shape == (32, 24) and found.model.config.vocab_size == 29
    wide = [path for path, leaf in flat(found.params).items() if leaf.dtype != jnp.bfloat16]
    assert wide == ["layers/0/attn/xpos_rate"] and flat(found.params)[wide[0]].dtype == jnp.float32
    config = found.model.config
    assert (config.hidden_dropout, config.attention_dropout, config.residual_dropout) == (0.1, 0.1, 0.1)
    assert (config.initialization, config.layer_scale_init) == ("stellarbyte", 1e-5)
    with pytest.raises(ValueError, match=r"does not have: layers/0/attn/k_norm.*\(qk_norm\)"):
        from_original(path, qk_norm=True)


def test_the_seeds_default_size() -> None:
    """The number of parameters that the original reports of its default config."""
    from stellarbyte_jax.hf.original import LAYOUTS
    from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

    def parameters(layout: str) -> int:
        family = LAYOUTS[layout].family
        model = ByteTransformer(ByteConfig(**family.read(family.defaults)))
        return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))

    assert parameters("seed") == 155_367_456
    assert parameters("december") == 86_516_224

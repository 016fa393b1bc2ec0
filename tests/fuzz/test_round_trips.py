"""Round trips of random small models through every family: settings, names, bytes and dtypes."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.hf_experts import routers_anew
from helpers.hf_models import assert_same_tree, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from stellarbyte_jax.config import ByteConfig, ConfigError
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.export import _meaning, export_family
from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.hf.files import float_dtype
from stellarbyte_jax.hf.settings import config_json
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

LAYERS = 3
DTYPES = ("float32", "bfloat16", "float16")
# Every setting of the network that a family may say, with values of which some say something else than the default.
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.integers(3, 40),
    "num_key_value_heads": st.sampled_from([None, 1, 2, 4]),
    "head_dim": st.sampled_from([None, 2, 6]),
    "intermediate_size": st.sampled_from([None, 5, 12]),
    "hidden_act": st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"]),
    "mlp_style": st.sampled_from(["gated", "gated", "stellarbyte"]),
    "max_position_embeddings": st.integers(2, 64),
    "tie_word_embeddings": st.booleans(),
    "position_embedding": st.sampled_from(["rope", "rope", "xpos", "stellarbyte"]),
    "rope_theta": st.sampled_from([10000.0, 500.0]),
    "rope_pairing": st.sampled_from(["half", "interleaved"]),
    "rope_scaling": st.sampled_from(
        [
            {},
            {"name": "linear", "factor": 2.0},
            {"name": "dynamic", "factor": 3.0},
            {"name": "yarn", "factor": 2.0, "attention_factor": 1.5, "beta_fast": 8.0},
            {"name": "yarn", "factor": 2.0, "original_max_position_embeddings": 7},
            {"name": "llama3", "factor": 2.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
        ]
    ),
    "xpos_scale_base": st.sampled_from([512.0, 64.0]),
    "xpos_learnable": st.booleans(),
    "rms_norm_eps": st.sampled_from([1e-5, 1e-3]),
    "rms_norm_eps_rule": st.sampled_from(["add", "add", "clamp"]),
    "attention_bias": st.booleans(),
    "attention_output_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "qk_norm": st.booleans(),
    "sliding_window": st.sampled_from([None, 1, 5]),
    "layer_types": st.sampled_from([None, ("full_attention", "sliding_attention", "full_attention")]),
    "sink_tokens": st.sampled_from([0, 0, 2]),
    "attention_logit_softcap": st.sampled_from([None, None, 30.0]),
    "parallel_residual": st.booleans(),
    "residual_scaling": st.sampled_from(["none", "none", "branch", "deepnorm"]),
    "layer_scale_init": st.sampled_from([None, None, 0.1]),
    "drop_path": st.sampled_from([0.0, 0.25]),
    "attention_dropout": st.sampled_from([0.0, 0.5]),
    "hidden_dropout": st.sampled_from([0.0, 0.25]),
    "residual_dropout": st.sampled_from([0.0, 0.125]),
    "initialization": st.sampled_from([None, "normal"]),
    "initializer_range": st.sampled_from([0.02, 0.5]),
}
# Of families that say little: drawn of all settings, hardly any model would be theirs.
OF_FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": (
        "num_key_value_heads",
        "intermediate_size",
        "hidden_act",
        "tie_word_embeddings",
        "rope_theta",
        "mlp_bias",
    ),
    "mistral": ("num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "vocab_size", "rope_scaling"),
    "qwen2": ("num_key_value_heads", "sliding_window", "layer_types", "tie_word_embeddings", "rope_scaling"),
    "qwen3": ("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "tie_word_embeddings"),
    "phi3": ("num_key_value_heads", "intermediate_size", "sliding_window", "rms_norm_eps", "tie_word_embeddings"),
    "mixtral": ("num_key_value_heads", "head_dim", "sliding_window", "rope_theta", "tie_word_embeddings"),
    "qwen3_moe": ("num_key_value_heads", "intermediate_size", "sliding_window", "vocab_size", "rope_scaling"),
    "stellarbyte": tuple(CHOICES),
}
ANY_LAYERS = st.fixed_dictionaries(
    {"num_experts": st.integers(2, 4)},
    optional={
        "num_experts_per_tok": st.integers(1, 2),
        "intermediate_size": st.integers(1, 5),
        "first_k_dense_replace": st.integers(0, LAYERS - 1),
        "decoder_sparse_step": st.integers(1, 2),
        "mlp_only_layers": st.lists(st.integers(0, LAYERS - 1), max_size=2).map(tuple),
        "norm_topk_prob": st.booleans(),
        "bias_update_rate": st.just(0.5),
    },
)
EXPERTS = {
    "mixtral": st.fixed_dictionaries({"num_experts": st.integers(2, 4)}, optional={"intermediate_size": st.just(5)}),
    "qwen3_moe": ANY_LAYERS,
}
FEWER = settings(max_examples=settings().max_examples // 12)  # each writes and reads two directories


@st.composite
def models(draw: st.DrawFn, names: tuple[str, ...], **fixed: Any) -> ByteConfig:
    """Settings of which about half are drawn."""
    said = {name: draw(CHOICES[name]) for name in names if draw(st.booleans())} | fixed
    try:
        return ByteConfig(
            **({"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 4} | said)
        )
    except ConfigError:
        assume(False)
        raise


def weights(config: ByteConfig, seed: int) -> dict[str, Any]:
    numbers = np.random.default_rng(seed)
    model = ByteTransformer(config)
    return routers_anew(
        model, jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape, "f4"), param_shapes(model))
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reads_and_writes_the_same(name: str) -> None:
    """From our side: the same settings and the same bits. From theirs: the same bytes and the same config.json."""

    @FEWER
    @given(st.data())
    def round_trip(data: st.DataObject) -> None:
        family = FAMILIES[name]
        experts = {"moe": data.draw(EXPERTS[name])} if name in EXPERTS else {}
        config = data.draw(models(OF_FAMILIES[name], **family.constants, **experts))
        try:
            assert export_family(config, name) is family
        except ValueError:
            assume(False)
        seed, dtype = data.draw(st.integers(0, 9)), data.draw(st.sampled_from(DTYPES))
        with tempfile.TemporaryDirectory() as place:
            ours_and_back(Path(place), config, name, seed)
            theirs_and_back(Path(place), config, name, seed, dtype)

    round_trip()


def ours_and_back(place: Path, config: ByteConfig, name: str, seed: int) -> None:
    params = weights(config, seed)
    save_pretrained(place / "ours", ByteTransformer(config), params, family=name)
    model, back = from_pretrained(place / "ours")
    assert _meaning(model.config) == _meaning(config)
    if config.rope_pairing in FAMILIES[name].pairings:
        assert_same_tree(back, params)


def theirs_and_back(place: Path, config: ByteConfig, name: str, seed: int, dtype: str) -> None:
    family, numbers, to = FAMILIES[name], np.random.default_rng(seed), float_dtype(dtype)
    shapes = {
        "/".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(ByteTransformer(config)))
    }
    entries = list(family.entries(config, shapes))
    held = {e.theirs: numbers.standard_normal(e.hf_shape, "f4").astype(e.dtype(to)) for e in entries}
    assert len(held) == len(entries), "a name twice"
    (place / "theirs").mkdir()
    save_file(held, place / "theirs" / "model.safetensors", metadata={"format": "pt"})
    (place / "theirs" / "config.json").write_text(json.dumps(config_json(family, config, dtype, {})))
    save_pretrained(place / "again", *from_pretrained(place / "theirs"), dtype=dtype, family=name)
    found = tensors(place / "again")
    assert found.keys() == held.keys(), "every key is read and written once"
    for key, tensor in held.items():
        assert found[key].dtype == tensor.dtype and found[key].tobytes() == tensor.tobytes(), key
    written = [json.loads((place / folder / "config.json").read_text()) for folder in ("theirs", "again")]
    assert written[0] == written[1]


@FEWER
@given(models(tuple(CHOICES)), st.integers(0, 9))
def test_the_family_that_is_chosen_is_the_same_model(config: ByteConfig, seed: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        params = weights(config, seed)
        save_pretrained(Path(place) / "hf", ByteTransformer(config), params)
        model, back = from_pretrained(Path(place) / "hf")
        assert _meaning(model.config) == _meaning(config)
        if config.rope_pairing == model.config.rope_pairing:
            assert_same_tree(back, params)

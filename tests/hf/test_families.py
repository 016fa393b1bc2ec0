"""Names and shapes of tensors against those of transformers, every weight once, and what no family expresses."""

import re
from typing import Any

import numpy as np
import pytest
from helpers.groups import grouped
from helpers.hf_models import NEEDS_TORCH, SMALL, small_config
from helpers.training import flat

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.export import export_family
from stellarbyte_jax.hf.families import FAMILIES, LLAMA, MISTRAL
from stellarbyte_jax.hf.table import Entry, Family, Piece
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: ByteConfig) -> Shapes:
    return {path: leaf.shape for path, leaf in flat(param_shapes(ByteTransformer(config))).items()}


def entries_of(family: Family, config: ByteConfig) -> list[Entry]:
    return list(family.entries(config, shapes_of(config)))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_family_is_a_class_of_transformers(name: str) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    import transformers

    family = FAMILIES[name]
    assert family.model_type == name
    assert getattr(transformers, family.architecture).config_class.model_type == name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"attention_bias": True}),
        ("mistral", {"num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_tensors_are_those_of_transformers(name: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    import transformers

    family = FAMILIES[name]
    architecture = getattr(transformers, family.architecture)
    with torch.device("meta"):
        peer = architecture(architecture.config_class(**(SMALL | settings)))
    theirs = {name: tuple(weight.shape) for name, weight in peer.named_parameters()}  # a tied head is no second one
    ours = small_config(**settings, attention_output_bias=settings.get("attention_bias", False))
    entries = entries_of(family, ours)
    assert len({entry.theirs for entry in entries}) == len(entries)
    assert {entry.theirs: entry.hf_shape for entry in entries} == theirs


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (0,)),
        ({"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, (0,)),
        ({"vocab_size_multiple": 64}, (0,)),
        ({"vocab_size_multiple": 64, "tie_word_embeddings": True}, (0,)),
        ({}, (1, 0)),
    ],
    ids=str,
)
def test_every_weight_is_part_of_one_tensor(settings: dict[str, Any], sizes: tuple[int, ...]) -> None:
    config = small_config(**settings)
    with grouped(*sizes):
        shapes = shapes_of(config)
        times = {path: np.zeros(shape, int) for path, shape in shapes.items()}
        for entry in LLAMA.entries(config, shapes):
            times[entry.path][entry.index] += 1
            assert times[entry.path][entry.index].shape == entry.shape
    if "vocab_size_multiple" in settings:
        padding = times["embed/embedding"][96:]
        assert padding.shape == (32, 32) and not padding.any()
        padding += 1
        if not config.tie_word_embeddings:
            assert not times["lm_head/kernel"][:, 96:].any()
            times["lm_head/kernel"][:, 96:] += 1
    for path, counted in times.items():
        assert (counted == 1).all(), path


def test_gate_and_up_are_slots_of_one_weight() -> None:
    gate, up = (
        next(e for e in entries_of(LLAMA, small_config()) if e.theirs == f"model.layers.1.mlp.{name}_proj.weight")
        for name in ("gate", "up")
    )
    assert gate.path == up.path == "layers/0/mlp/gate_up"
    leaf_LD2F = np.arange(3 * 32 * 2 * 56).reshape(3, 32, 2, 56)
    np.testing.assert_array_equal(leaf_LD2F[gate.index], leaf_LD2F[1, :, 0])
    np.testing.assert_array_equal(leaf_LD2F[up.index], leaf_LD2F[1, :, 1])


def test_layers_are_counted_through_all_groups() -> None:
    config = small_config()
    with grouped(1, 2):
        entries = entries_of(LLAMA, config)
    found = {e.theirs: (e.path, e.index) for e in entries if e.theirs.endswith("input_layernorm.weight")}
    assert found == {
        "model.layers.0.input_layernorm.weight": ("layers/0/attn_norm/scale", (0,)),
        "model.layers.1.input_layernorm.weight": ("layers/1/attn_norm/scale", (0,)),
        "model.layers.2.input_layernorm.weight": ("layers/1/attn_norm/scale", (1,)),
    }


def test_queries_and_keys_alone_are_rotated() -> None:
    rotated = {row.theirs.rpartition("self_attn.")[2] for row in LLAMA.rows if row.rotary}
    assert rotated == {"q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"}


@pytest.mark.parametrize("family", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_buffers_of_old_checkpoints_are_known(family: Family) -> None:
    def known(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in family.buffers)

    assert known("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert known("model.layers.31.self_attn.rotary_emb.inv_freq")
    assert known("model.rotary_emb.inv_freq")
    assert not known("model.layers.x.self_attn.rotary_emb.inv_freq")
    assert not any(known(row.theirs.format(i=0)) for row in family.rows)


def test_a_model_is_exported_as_the_simplest_family() -> None:
    def family(**settings: Any) -> str:
        return export_family(ByteConfig(**(SMALL | settings))).model_type

    assert family() == "llama"
    assert family(sliding_window=8) == "mistral"
    assert family(hidden_size=36, num_attention_heads=8, head_dim=6) == "mistral"
    assert family(layer_types=("full_attention",) * 3) == "llama"
    assert family(layer_types=("sliding_attention",) * 3, sliding_window=8) == "mistral"
    assert family(attention_bias=True, attention_output_bias=True) == "llama"
    assert family(rope_scaling={"name": "yarn", "factor": 2.0}, vocab_size_multiple=64) == "llama"


NO_MISTRAL = "of those families only Llama has biases, but {} needs Mistral"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position_embedding": "xpos"}, "position_embedding is 'xpos', only 'rope' exists there"),
        ({"position_embedding": "stellarbyte"}, "position_embedding is 'stellarbyte', only 'rope' exists there"),
        ({"mlp_style": "stellarbyte"}, "mlp_style is 'stellarbyte', only 'gated' exists there"),
        (
            {"sliding_window": 4, "sink_tokens": 2},
            "sink_tokens is 2, a window there hides a document's first tokens too",
        ),
        ({"attention_prune_below": 0.01}, "attention_prune_below is 0.01, those families leave no keys out"),
        (
            {"memory": {"length": 4}},
            "memory.length is given, those families remember nothing beyond their cache",
        ),
        (
            {"memory": {"length": (4, 0, 4)}},
            "memory.length is given, those families remember nothing beyond their cache",
        ),
        ({"parallel_residual": True}, "parallel_residual is true, there the MLP comes after attention"),
        (
            {"residual_scaling": "branch"},
            "residual_scaling is 'branch', those families add branches as they are",
        ),
        (
            {"residual_scaling": "deepnorm"},
            "residual_scaling is 'deepnorm', those families add branches as they are",
        ),
        ({"layer_scale_init": 0.1}, "layer_scale_init is given, those families scale no channels of a branch"),
        ({"rms_norm_eps_rule": "clamp"}, "rms_norm_eps_rule is 'clamp', only 'add' exists there"),
        ({"qk_norm": True}, "qk_norm is true, those families have no norm on queries and keys"),
        (
            {"attention_bias": True},
            "attention_bias is true without attention_output_bias, there both are one setting",
        ),
        (
            {"attention_output_bias": True},
            "attention_output_bias is true without attention_bias, there both are one setting",
        ),
        (
            {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "sliding_window": 4},
            f"attention_bias and mlp_bias: {NO_MISTRAL.format('sliding_window')}",
        ),
        (
            {"mlp_bias": True, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4},
            f"mlp_bias: {NO_MISTRAL.format('head_dim')}",
        ),
        ({"attention_logit_softcap": 30.0}, "attention_logit_softcap is 30.0, those families have none"),
        (
            {
                "sliding_window": 4,
                "layer_types": ("full_attention", "sliding_attention", "full_attention"),
            },
            "layer_types mixes full and sliding attention, there all layers are alike",
        ),
        (
            {"position_embedding": "xpos", "xpos_learnable": True, "qk_norm": True},
            "position_embedding is 'xpos', only 'rope' exists there; xpos_learnable is true, those families learn "
            "nothing about positions; qk_norm is true, those families have no norm on queries and keys",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_no_family_expresses_is_named_alone(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        export_family(small_config(**settings))
    assert str(caught.value) == (
        f"no Hugging Face family of llama, mistral can express this model: {message}. Keep it as a checkpoint of this "
        "project, or train with the settings of those families"
    )

"""Names and shapes of tensors against those of transformers, every weight once, and what no family expresses."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from helpers.groups import grouped
from helpers.hf_models import NEEDS_TORCH, SMALL, small_config
from helpers.training import flat

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf import export
from stellarbyte_jax.hf.export import export_family
from stellarbyte_jax.hf.families import FAMILIES, LLAMA, MISTRAL, MIXTRAL, PHI3, QWEN2, QWEN3, QWEN3_MOE, STELLARBYTE
from stellarbyte_jax.hf.settings import parse_config
from stellarbyte_jax.hf.table import Entry, Family
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.state.router import is_tracked

Shapes = dict[str, tuple[int, ...]]
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
}


def shapes_of(config: ByteConfig) -> Shapes:
    return {path: leaf.shape for path, leaf in flat(param_shapes(ByteTransformer(config))).items()}


def entries_of(family: Family, config: ByteConfig) -> list[Entry]:
    return list(family.entries(config, shapes_of(config)))


def with_fused_rows(family: Family) -> Family:
    paths = {row.ours for row in family.fused}
    return dataclasses.replace(family, rows=(*(row for row in family.rows if row.ours not in paths), *family.fused))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.modelling_file is None])
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
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 16, "attention_bias": True}),
        ("phi3", {"pad_token_id": 0}),
        ("mixtral", EXPERTS["mixtral"]),
        ("qwen3_moe", EXPERTS["qwen3_moe"]),
        ("qwen3_moe", EXPERTS["qwen3_moe"] | {"mlp_only_layers": [1], "head_dim": 16, "attention_bias": True}),
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
    values = {"model_type": name} | SMALL | settings
    family = with_fused_rows(family)  # the peer in memory
    entries = entries_of(family, parse_config(values, "here")[1])
    assert len({entry.theirs for entry in entries}) == len(entries)
    assert {entry.theirs: entry.hf_shape for entry in entries} == theirs


@pytest.mark.parametrize(
    ("family", "settings", "sizes"),
    [
        (LLAMA, {}, (0,)),
        (LLAMA, {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, (0,)),
        (LLAMA, {"vocab_size_multiple": 64}, (0,)),
        (LLAMA, {"vocab_size_multiple": 64, "tie_word_embeddings": True}, (0,)),
        (LLAMA, {}, (1, 0)),
        (PHI3, {}, (1, 0)),
        (QWEN2, {"attention_bias": True}, (0,)),
        (QWEN3, {"qk_norm": True, "attention_bias": True, "attention_output_bias": True}, (0,)),
        (MIXTRAL, {"moe": {"num_experts": 5}}, (0,)),
        (MIXTRAL, {"moe": {"num_experts": 5}}, (1, 0)),
        (QWEN3_MOE, {"qk_norm": True, "moe": {"num_experts": 5, "intermediate_size": 24}}, (0,)),
        (STELLARBYTE, {"position_embedding": "xpos", "xpos_learnable": True, "layer_scale_init": 0.1}, (0,)),
        (STELLARBYTE, {"mlp_style": "stellarbyte", "parallel_residual": True, "qk_norm": True}, (1, 0)),
        (STELLARBYTE, {"residual_scaling": "deepnorm", "attention_bias": True, "mlp_bias": True}, (0,)),
    ],
    ids=lambda x: x.model_type if isinstance(x, Family) else str(x),
)
def test_every_weight_is_part_of_one_tensor(family: Family, settings: dict[str, Any], sizes: tuple[int, ...]) -> None:
    config = small_config(**settings)
    with grouped(*sizes):
        shapes = shapes_of(config)
        times = {path: np.zeros(shape, int) for path, shape in shapes.items()}
        for entry in family.entries(config, shapes):
            for piece in entry.pieces:
                times[piece.path][piece.index] += 1
                assert times[piece.path][piece.index].shape == piece.shape
    if "vocab_size_multiple" in settings:
        padding = times["embed/embedding"][96:]
        assert padding.shape == (32, 32) and not padding.any()
        padding += 1
        if not config.tie_word_embeddings:
            assert not times["lm_head/kernel"][:, 96:].any()
            times["lm_head/kernel"][:, 96:] += 1
    for path, counted in times.items():
        assert (counted == (not is_tracked(path))).all(), path


@pytest.mark.parametrize("family", [MIXTRAL, QWEN3_MOE], ids=lambda family: family.model_type)
@pytest.mark.parametrize("fused", [False, True], ids=["listed", "fused"])
def test_every_weight_of_irregular_layers_is_part_of_one_tensor(family: Family, fused: bool) -> None:
    dense = () if family is MIXTRAL else (0, 3)
    config = small_config(
        num_hidden_layers=5, qk_norm=family is QWEN3_MOE, moe={"num_experts": 3, "mlp_only_layers": dense}
    )
    shapes = shapes_of(config)
    times = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    for entry in (with_fused_rows(family) if fused else family).entries(config, shapes):
        for piece in entry.pieces:
            times[piece.path][piece.index] += 1
    assert all((counted == (not is_tracked(path))).all() for path, counted in times.items())


def test_an_expert_is_an_entry_of_its_own() -> None:
    """So that no more of a large layer is in memory at once."""
    entries = entries_of(QWEN3_MOE, small_config(qk_norm=True, moe={"num_experts": 5, "intermediate_size": 24}))
    found = {e.theirs: (e.hf_shape, e.pieces[0].index) for e in entries if "layers.1.mlp.experts.3" in e.theirs}
    whole = slice(None)
    assert found == {
        "model.layers.1.mlp.experts.3.gate_proj.weight": ((24, 32), (1, 3, whole, 0)),
        "model.layers.1.mlp.experts.3.up_proj.weight": ((24, 32), (1, 3, whole, 1)),
        "model.layers.1.mlp.experts.3.down_proj.weight": ((32, 24), (1, 3)),
    }


def test_gate_and_up_are_slots_of_one_weight() -> None:
    gate, up = (
        next(e for e in entries_of(LLAMA, small_config()) if e.theirs == f"model.layers.1.mlp.{name}_proj.weight")
        for name in ("gate", "up")
    )
    assert gate.pieces[0].path == up.pieces[0].path == "layers/0/mlp/gate_up"
    leaf_LD2F = np.arange(3 * 32 * 2 * 56).reshape(3, 32, 2, 56)
    np.testing.assert_array_equal(leaf_LD2F[gate.pieces[0].index], leaf_LD2F[1, :, 0])
    np.testing.assert_array_equal(leaf_LD2F[up.pieces[0].index], leaf_LD2F[1, :, 1])


def test_a_tensor_of_several_weights_is_cut_where_they_meet() -> None:
    entry = next(e for e in entries_of(PHI3, small_config()) if "qkv_proj" in e.theirs)
    assert entry.hf_shape == (64, 32)
    assert [(piece.path.rpartition("/")[2], entry.rows_of(i)) for i, piece in enumerate(entry.pieces)] == [
        ("q", slice(0, 32)),
        ("k", slice(32, 48)),
        ("v", slice(48, 64)),
    ]


def test_layers_are_counted_through_all_groups() -> None:
    config = small_config()
    with grouped(1, 2):
        entries = entries_of(LLAMA, config)
    found = {
        e.theirs: (e.pieces[0].path, e.pieces[0].index) for e in entries if e.theirs.endswith("input_layernorm.weight")
    }
    assert found == {
        "model.layers.0.input_layernorm.weight": ("layers/0/attn_norm/scale", (0,)),
        "model.layers.1.input_layernorm.weight": ("layers/1/attn_norm/scale", (0,)),
        "model.layers.2.input_layernorm.weight": ("layers/1/attn_norm/scale", (1,)),
    }


def test_queries_and_keys_alone_are_rotated() -> None:
    rotated = {row.theirs.rpartition("self_attn.")[2] for row in LLAMA.rows if row.rotary}
    assert rotated == {"q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"}


@pytest.mark.parametrize(
    "family", [LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, MIXTRAL, QWEN3_MOE], ids=lambda family: family.model_type
)
def test_buffers_of_old_checkpoints_are_known(family: Family) -> None:
    def known(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in family.buffers)

    assert known("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert known("model.layers.31.self_attn.rotary_emb.inv_freq")
    assert known("model.rotary_emb.inv_freq")
    assert not known("model.layers.x.self_attn.rotary_emb.inv_freq")
    assert not any(known(row.theirs.format(i=0, e=0)) for row in family.rows)


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
    assert family(attention_bias=True) == "qwen2"
    mixed = {"layer_types": ("full_attention", "sliding_attention", "full_attention"), "sliding_window": 8}
    assert family(attention_bias=True, **mixed) == family(**mixed | {"attention_bias": True}) == "qwen2"
    assert family(qk_norm=True) == family(qk_norm=True, head_dim=6, **mixed) == "qwen3"
    assert family(qk_norm=True, attention_bias=True, attention_output_bias=True) == "qwen3"
    for own in (
        {"position_embedding": "xpos"},
        {"position_embedding": "stellarbyte"},
        {"mlp_style": "stellarbyte"},
        {"sliding_window": 4, "sink_tokens": 2},
        {"parallel_residual": True},
        {"residual_scaling": "branch"},
        {"residual_scaling": "deepnorm"},
        {"layer_scale_init": 0.1},
        {"rms_norm_eps_rule": "clamp"},
        {"qk_norm": True, "attention_bias": True},
        {"attention_output_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "sliding_window": 4},
        {"mlp_bias": True, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4},
        {"attention_logit_softcap": 30.0},
        mixed,
    ):
        assert family(**own) == "stellarbyte", own


# Other values of what says nothing of the finished model.
SILENT: dict[str, Any] = {
    "vocab_size_multiple": 64,
    "rope_pairing": "interleaved",
    "drop_path": 0.1,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "residual_dropout": 0.1,
    "initialization": "depth",
    "initializer_range": 0.1,
    "compute_dtype": "float32",
    "matmul_dtype": "float8",
    "attention_implementation": "reference",
    "remat": "full",
    "scan_unroll": 2,
    "cache": {"dtype": "int8"},
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_of_training_or_of_computing_asks_for_no_family_of_its_own(name: str) -> None:
    config = ByteConfig(**SMALL)
    changed = ByteConfig(**SMALL | {name: SILENT[name]})
    assert changed != config
    assert export_family(changed) is LLAMA and export_family(changed, "mistral") is MISTRAL


def test_a_family_may_be_asked_for() -> None:
    assert export_family(small_config(), "phi3") is PHI3
    assert export_family(small_config(), "stellarbyte") is STELLARBYTE
    with pytest.raises(ValueError, match=r"^there is no family 'gpt2': known are llama, "):
        export_family(small_config(), "gpt2")
    with pytest.raises(ValueError) as caught:
        export_family(
            small_config(position_embedding="xpos", rope_scaling={"name": "linear", "factor": 2.0}), "mistral"
        )
    assert str(caught.value) == (
        "a Hugging Face directory of the family mistral cannot express this model: position_embedding is 'xpos', there "
        "'rope'. Leave the family out, to have one chosen"
    )
    with pytest.raises(ValueError, match="rope_type 'linear' means something else there; implemented is default"):
        export_family(small_config(rope_scaling={"name": "linear", "factor": 2.0}), "phi3")
    with pytest.raises(ValueError, match="transformers wants a hidden_size that num_attention_heads divides"):
        export_family(small_config(num_attention_heads=3, num_key_value_heads=3, head_dim=4), "llama")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_prune_below": 0.25}, "attention_prune_below is 0.25, there 0.0"),
        ({"memory": {"length": 8}, "parallel_residual": True}, "memory.length is 8, there 0"),
        (
            {"memory": {"length": 8, "recent_share": 0.5}},
            "memory.length is 8, there 0; memory.recent_share is 0.5, there 1.0",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_no_family_expresses_is_named_alone(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        export_family(small_config(**settings))
    assert str(caught.value) == (
        f"a Hugging Face directory of the family stellarbyte cannot express this model: {message}. Keep it as a "
        "checkpoint of this project"
    )


def test_every_setting_of_the_network_is_known_to_export() -> None:
    """A new one is an obstacle until a family says it, never lost in silence."""
    silent = {name for name in export._WITHOUT_MEANING if name not in ByteConfig().to_dict()}
    assert not silent, "a setting that no longer exists"
    assert set(SILENT) | {"lora"} == set(export._WITHOUT_MEANING)  # adapters are merged before
    told = {name for name in export._meaning(ByteConfig())}
    sections = {"rope_scaling", "memory", "moe"}
    assert {f.name for f in dataclasses.fields(ByteConfig)} - sections == (
        {name for name in told if "." not in name} | set(export._WITHOUT_MEANING)
    )
    experts = ByteConfig(moe={"num_experts": 4})
    told = {name.removeprefix("moe.") for name in export._meaning(experts) if name.startswith("moe.")}
    of_layers = {"first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers"}
    assert not told & {*of_layers, *export._OF_TRAINING} and "layers" in told
    assert told - {"layers"} | of_layers | set(export._OF_TRAINING) == set(experts.moe.to_dict())

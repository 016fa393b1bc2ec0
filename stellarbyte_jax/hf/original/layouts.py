"""One table for each layout of the original's checkpoints: ``seed``, of July 2025, and ``december``, of December 2025.

What lies between them (August to November) had other networks, and its checkpoints are refused by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.layout import NEGATED, SAME, SPLIT_INPUT, SPLIT_OUTPUT
from stellarbyte_jax.hf.table import Family, Field, Row, same

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = "layers.{i}."


@dataclass(frozen=True)
class Original:
    """A layout.

    Attributes:
      name: of the layout.
      family: its weights and the fields of its config class, as for a family of Hugging Face.
      embedding: name of the embedding.
      head: name of the head.
      marks: tensors by which the layout is known.
      sizes: the fields that shapes of tensors give, from these and from what is known of the others.
      without_effect: fields that change nothing of what the network computes.
      refusals: what a value that is not implemented means, and what to do, by field.
      unused: patterns of tensors that a model with these settings holds and does not use.
      adds_bos: whether the original trained on texts that begin with bos.
    """

    name: str
    family: Family
    embedding: str
    head: str
    marks: tuple[str, ...]
    sizes: Callable[[Shapes, Mapping[str, Any]], dict[str, int]]
    without_effect: tuple[str, ...]
    refusals: Mapping[str, str]
    unused: Callable[[Mapping[str, Any]], tuple[str, ...]]
    adds_bos: bool


def _dims(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor that sizes are taken from; raises ValueError where it is missing, empty or misshapen."""
    if name not in shapes:
        raise ValueError(f"{name} is missing, so the sizes of the model are not known: copy the file again")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise ValueError(f"{name} has shape {shapes[name]}, expected {axes} axes: copy the file again")
    return shapes[name]


def _layers(shapes: Shapes, prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}(\d{{1,6}})\.", name) for name in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _branches(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(values["use_deepnorm"], bool):
        raise ValueError(f"use_deepnorm must be true or false, got {shown(values['use_deepnorm'])}")
    return {"residual_scaling": "branch" if values["use_deepnorm"] else "none"}


def _seed_sizes(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, int]:
    del stated  # shapes say everything: each layer has a learned vector of half a head's size
    vocabulary, width = _dims(shapes, "embed_tokens.weight", 2)
    head_size = 2 * _dims(shapes, "layers.0.self_attn.rotary.log_scale_weight", 1)[0]
    return {
        "vocab_size": vocabulary,
        "model_dim": width,
        "num_layers": _layers(shapes, "layers."),
        "num_attention_heads": width // head_size,
        "num_kv_heads": _dims(shapes, "layers.0.self_attn.W_k.weight", 2)[0] // head_size,
        "hidden_dim": _dims(shapes, "layers.0.mlp.w2.weight", 2)[1],
    }


SEED = Original(
    name="seed",
    family=Family(
        model_type="stellarbyte_model",
        architecture="ByteTransformer",
        rows=(
            Row("embed/embedding", "embed_tokens.weight", SAME, vocab=0),
            Row("final_norm/scale", "norm.weight", SAME),
            Row("lm_head/kernel", "lm_head.weight", SPLIT_OUTPUT, vocab=1),
            Row("layers/attn_norm/scale", _LAYER + "norm_attn.weight", SAME),
            Row("layers/mlp_norm/scale", _LAYER + "norm_ffn.weight", SAME),
            Row("layers/attn_scale", _LAYER + "ls_attn", SAME),
            Row("layers/mlp_scale", _LAYER + "ls_mlp", SAME),
            Row("layers/attn/q", _LAYER + "self_attn.W_q.weight", SPLIT_OUTPUT),
            Row("layers/attn/k", _LAYER + "self_attn.W_k.weight", SPLIT_OUTPUT),
            Row("layers/attn/v", _LAYER + "self_attn.W_v.weight", SPLIT_OUTPUT),
            Row("layers/attn/o", _LAYER + "self_attn.W_o.weight", SPLIT_INPUT),
            Row("layers/attn/xpos_rate", _LAYER + "self_attn.rotary.log_scale_weight", NEGATED, float32=True),
            Row("layers/mlp/norm/scale", _LAYER + "mlp.norm.weight", SAME),
            Row("layers/mlp/gate_up", _LAYER + "mlp.w13.weight", SPLIT_OUTPUT, slot=0),
            Row("layers/mlp/gate_up", _LAYER + "mlp.w13.weight", SPLIT_OUTPUT, slot=1),
            Row("layers/mlp/down", _LAYER + "mlp.w2.weight", SPLIT_INPUT),
        ),
        buffers=(),
        fields=(
            same("vocab_size", 32000),
            same("model_dim", 768, ours="hidden_size"),
            same("num_layers", 12, ours="num_hidden_layers"),
            same("num_attention_heads", 16),
            same("num_kv_heads", 8, ours="num_key_value_heads", nullable=True),
            same("hidden_dim", None, ours="intermediate_size", nullable=True),
            same("max_seq_len", 2048, ours="max_position_embeddings"),
            same("drop_path_prob", 0.0, ours="drop_path"),
            same("hidden_dropout_prob", 0.1, ours="hidden_dropout"),
            same("attention_dropout_prob", 0.1, ours="attention_dropout"),
            same("residual_dropout_prob", 0.1, ours="residual_dropout"),
            same("layer_norm_eps", 1e-5, ours="rms_norm_eps"),
            same("initializer_range", 0.02),
            same("tie_word_embeddings", False),
            same("xpos_rope_theta", 10000.0, ours="rope_theta"),
            same("xpos_scale_base", 512.0),
            same("layerscale_init", 1e-5, ours="layer_scale_init"),
            same("parallel_residual", False),
            Field(
                {"use_deepnorm": True}, _branches, lambda config: {"use_deepnorm": config.residual_scaling == "branch"}
            ),
        ),
        constants={
            "position_embedding": "stellarbyte",
            "xpos_learnable": True,
            "mlp_style": "stellarbyte",
            "rms_norm_eps_rule": "clamp",
            "initialization": "stellarbyte",
        },
        fixed={"use_causal": (True,)},
    ),
    embedding="embed_tokens.weight",
    head="lm_head.weight",
    marks=("embed_tokens.weight", "norm.weight"),
    sizes=_seed_sizes,
    without_effect=(
        *("dim_multiplier", "use_flash_attention", "use_cache", "key_cache_dtype", "value_cache_dtype"),
        *("model_parallel_size", "tensor_parallel_size", "tensor_parallel_rank"),
    ),
    refusals={"use_causal": "every token would see those after it, which no layer here does: set it to true"},
    unused=lambda values: (r"layers\.\d+\.norm_ffn\.weight",) if values["parallel_residual"] is True else (),
    adds_bos=True,
)


def _december_sizes(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, int]:
    vocabulary, width = _dims(shapes, "model.embed_tokens.weight", 2)
    found = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": _layers(shapes, "model.layers."),
        "intermediate_size": _dims(shapes, "model.layers.0.mlp.down_proj.weight", 2)[1],
    }
    keys = _dims(shapes, "model.layers.0.self_attn.k_proj.weight", 2)[0]
    heads = stated["num_attention_heads"]  # shapes give the product of heads and their size alone
    if not (type(heads) is int and heads > 0 and width % heads == 0 and keys % (width // heads) == 0):
        raise ValueError(
            f"{shown(heads)} attention heads do not fit a width of {width} with keys of {keys}: give --config with "
            "num_attention_heads"
        )
    return {**found, "num_key_value_heads": keys // (width // heads)}


def _december_size(values: Mapping[str, Any]) -> Mapping[str, Any]:
    size, width = values["intermediate_size"], values["hidden_size"]
    if size is None and type(width) is int:
        size = 8 * width // 384 * 128  # two thirds of 4 x, in whole blocks of 128
    return {"hidden_size": width, "intermediate_size": size}


_TRAINED_POSITIONS = 2048  # where the stretching of frequencies begins


def _december_positions(values: Mapping[str, Any]) -> Mapping[str, Any]:
    stretched, table, positions = (
        values[name] for name in ("inference_rope_scaling", "rope_scaling", "max_position_embeddings")
    )
    if not isinstance(stretched, bool):
        raise ValueError(f"inference_rope_scaling must be true or false, got {shown(stretched)}")
    if table is not None and not stretched:
        raise ValueError(
            f"rope_scaling is {shown(table)}, which the original sets by inference_rope_scaling alone: remove it"
        )
    if stretched and not (type(positions) is int and positions <= _TRAINED_POSITIONS):
        raise ValueError(
            "inference_rope_scaling is true: that is a YaRN of the original's own, which is not implemented. Set it to "
            "false, and rope_scaling to null, to import the model as it was trained; rope_scaling of a loaded model "
            "stretches it here"
        )
    return {"max_position_embeddings": positions}


_DROPOUTS = ("hidden_dropout", "attention_dropout", "residual_dropout")
DECEMBER = Original(
    name="december",
    family=Family(
        model_type="stellarbytecasualmodel",
        architecture="StellarByteForCausalLM",
        rows=llama_like.DECODER_ROWS,
        buffers=(),
        fields=(
            same("vocab_size", 64000),
            Field(
                {"hidden_size": 512, "intermediate_size": None},
                _december_size,
                lambda config: {"hidden_size": config.hidden_size, "intermediate_size": config.mlp_size},
                ("intermediate_size",),
            ),
            same("num_hidden_layers", 8),
            same("num_attention_heads", 8),
            same("num_key_value_heads", 2, nullable=True),
            llama_like.ACTIVATION,
            Field(
                {"max_position_embeddings": 32768, "inference_rope_scaling": False, "rope_scaling": None},
                _december_positions,
                lambda config: {"max_position_embeddings": config.max_position_embeddings},
                ("rope_scaling",),
            ),
            same("rope_theta", 1e6),
            Field(
                {"dropout": 0.0},
                lambda values: dict.fromkeys(_DROPOUTS, values["dropout"]),
                lambda config: {"dropout": config.hidden_dropout},
            ),
            same("rms_norm_eps", 1e-5),
            same("initializer_range", 0.02),
            same("tie_word_embeddings", False),
        ),
        fixed={"use_moe": (False,)},
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    marks=("model.embed_tokens.weight", "model.norm.weight"),
    sizes=_december_sizes,
    without_effect=(
        *("flash_attn", "use_cache", "dtype", "verbose_init", "pad_token_id", "bos_token_id", "eos_token_id"),
        *("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "scoring_func", "aux_loss_alpha"),
        *("seq_aux", "norm_topk_prob"),
    ),
    refusals={"use_moe": "this network has no mixture of experts, so such a model cannot be imported"},
    unused=lambda values: (),
    adds_bos=False,
)

LAYOUTS: Mapping[str, Original] = {layout.name: layout for layout in (SEED, DECEMBER)}
# Embeddings of what lay between.
OTHER_EMBEDDINGS = {
    "token_embedding.embed_tokens.weight": "ByteModel, of August and September 2025",
    "tok_embeddings.weight": "StellarByteModel, of September to November 2025",
}

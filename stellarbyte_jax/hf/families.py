"""One table per family: where each weight lies and what each setting is called in a Hugging Face checkpoint.

The same table is read both ways. ``{i}`` in a name is the layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.layout import FLAT, SAME, SPLIT_INPUT, SPLIT_OUTPUT, Layout


@dataclass(frozen=True)
class Row:
    """One weight: our path, their name, and the layout between them.

    Attributes:
      ours: path in the parameter tree; ``layers/...`` leaves out the number of the layer group.
      theirs: name in the checkpoint.
      layout: from one to the other.
      slot: index in the last axis but one, "gate", of ``gate_up``, which is two tensors of theirs.
      rotary: the last axis of ours is rotated in pairs.
      vocab: axis of ours that is padded beyond the vocabulary, which theirs is not.
    """

    ours: str
    theirs: str
    layout: Layout
    slot: int | None = None
    rotary: bool = False
    vocab: int | None = None


@dataclass(frozen=True)
class Entry:
    """A row for one layer: the part ``index`` of the leaf at ``path`` is the tensor ``theirs``."""

    path: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    theirs: str
    row: Row

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of their tensor."""
        return self.row.layout.hf_shape(self.shape)


@dataclass(frozen=True)
class Family:
    """What a Hugging Face ``model_type`` means here.

    Attributes:
      model_type: the name in config.json.
      architecture: the class with a language-modelling head.
      rows: the weights.
      buffers: patterns of tensors that older checkpoints hold and nobody needs.
      settings: their fields that are ByteConfig fields of the same name, each with their default.
      nullable: those of ``settings`` that may be null in a file; transformers refuses it in the others, some of them
        in training alone.
      fixed: their fields that may only have the values listed (the first is the default).
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    buffers: tuple[str, ...]
    settings: Mapping[str, Any]
    nullable: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def entries(self, config: ByteConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
        """Every tensor of a checkpoint, layer after layer, for the leaves whose ``shapes`` are given by path.

        What a model does not have, such as biases or a tied head, has no shape and gives no tensor.
        """
        stacked = [row for row in self.rows if row.ours.startswith("layers/")]
        for row in self.rows:
            if row.ours in shapes:
                index: tuple[int | slice, ...] = ()
                shape = shapes[row.ours]
                if row.vocab is not None and shape[row.vocab] != config.vocab_size:
                    index = (slice(None),) * row.vocab + (slice(config.vocab_size),)
                    shape = (*shape[: row.vocab], config.vocab_size, *shape[row.vocab + 1 :])
                yield Entry(row.ours, index, shape, row.theirs, row)
        places = [(number, row) for number, group in enumerate(config.layer_groups) for row in range(len(group.specs))]
        for i, (group, place) in enumerate(places):
            for row in stacked:
                path = row.ours.replace("layers/", f"layers/{group}/", 1)
                if path not in shapes:
                    continue
                shape = shapes[path][1:]
                index = (place,)
                if row.slot is not None:
                    index += (slice(None),) * (len(shape) - 2) + (row.slot,)
                    shape = (*shape[:-2], shape[-1])
                yield Entry(path, index, shape, row.theirs.format(i=i), row)


_ROWS = (
    Row("embed/embedding", "model.embed_tokens.weight", SAME, vocab=0),
    Row("layers/attn_norm/scale", "model.layers.{i}.input_layernorm.weight", SAME),
    Row("layers/attn/q", "model.layers.{i}.self_attn.q_proj.weight", SPLIT_OUTPUT, rotary=True),
    Row("layers/attn/k", "model.layers.{i}.self_attn.k_proj.weight", SPLIT_OUTPUT, rotary=True),
    Row("layers/attn/v", "model.layers.{i}.self_attn.v_proj.weight", SPLIT_OUTPUT),
    Row("layers/attn/o", "model.layers.{i}.self_attn.o_proj.weight", SPLIT_INPUT),
    Row("layers/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight", SAME),
    Row("layers/mlp/gate_up", "model.layers.{i}.mlp.gate_proj.weight", SPLIT_OUTPUT, slot=0),
    Row("layers/mlp/gate_up", "model.layers.{i}.mlp.up_proj.weight", SPLIT_OUTPUT, slot=1),
    Row("layers/mlp/down", "model.layers.{i}.mlp.down_proj.weight", SPLIT_INPUT),
    Row("final_norm/scale", "model.norm.weight", SAME),
    Row("lm_head/kernel", "lm_head.weight", SPLIT_OUTPUT, vocab=1),
)
_BIAS_ROWS = (
    Row("layers/attn/q_bias", "model.layers.{i}.self_attn.q_proj.bias", FLAT, rotary=True),
    Row("layers/attn/k_bias", "model.layers.{i}.self_attn.k_proj.bias", FLAT, rotary=True),
    Row("layers/attn/v_bias", "model.layers.{i}.self_attn.v_proj.bias", FLAT),
    Row("layers/attn/o_bias", "model.layers.{i}.self_attn.o_proj.bias", FLAT),
    Row("layers/mlp/gate_up_bias", "model.layers.{i}.mlp.gate_proj.bias", FLAT, slot=0),
    Row("layers/mlp/gate_up_bias", "model.layers.{i}.mlp.up_proj.bias", FLAT, slot=1),
    Row("layers/mlp/down_bias", "model.layers.{i}.mlp.down_proj.bias", FLAT),
)
_ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

_SETTINGS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_FIXED: Mapping[str, tuple[Any, ...]] = {"pretraining_tp": (1, None), "rope_interleaved": (False, None)}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=_ROWS + _BIAS_ROWS,
    buffers=_ROTARY_BUFFERS,
    # Their attention_bias is a bias on q, k, v and the output projection.
    settings={**_SETTINGS, "attention_bias": False, "mlp_bias": False},
    nullable=("num_key_value_heads", "head_dim"),
    fixed=_FIXED,
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=_ROWS,
    buffers=_ROTARY_BUFFERS,
    settings={
        **_SETTINGS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    nullable=("head_dim", "sliding_window"),
    fixed={**_FIXED, "attention_bias": (False, None), "mlp_bias": (False, None)},
)
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL)}


def export_family(config: ByteConfig) -> Family:
    """The family that computes exactly what ``config`` says, the most widely read one first.

    Raises:
      ValueError: there is none; the message names each setting that stands in the way and what to do.
    """
    obstacles = [words for stands_in_the_way, words in _obstacles(config) if stands_in_the_way]
    if obstacles:
        raise ValueError(
            f"no Hugging Face family of {', '.join(FAMILIES)} can express this model: {'; '.join(obstacles)}. "
            "Keep it as a checkpoint of this project, or train with the settings of those families"
        )
    return MISTRAL if _only_mistral(config) else LLAMA


def _only_mistral(config: ByteConfig) -> str:
    """What Llama cannot express and Mistral can; empty where there is nothing."""
    if set(config.windows) != {None}:
        return "sliding_window"
    # transformers 5 refuses such a Llama; Mistral is the same network.
    return "head_dim" if config.hidden_size % config.num_attention_heads else ""


def _obstacles(c: ByteConfig) -> Iterator[tuple[bool, str]]:
    yield c.position_embedding != "rope", f"position_embedding is {c.position_embedding!r}, only 'rope' exists there"
    yield c.xpos_learnable, "xpos_learnable is true, those families learn nothing about positions"
    yield c.rms_norm_eps_rule != "add", f"rms_norm_eps_rule is {c.rms_norm_eps_rule!r}, only 'add' exists there"
    yield c.mlp_style != "gated", f"mlp_style is {c.mlp_style!r}, only 'gated' exists there"
    yield c.qk_norm, "qk_norm is true, those families have no norm on queries and keys"
    yield (
        c.attention_bias and not c.attention_output_bias,
        "attention_bias is true without attention_output_bias, there both are one setting",
    )
    yield (
        c.attention_output_bias and not c.attention_bias,
        "attention_output_bias is true without attention_bias, there both are one setting",
    )
    biases = [name for name in ("attention_bias", "mlp_bias") if getattr(c, name)]
    reason = _only_mistral(c)
    yield (
        bool(biases and reason),
        f"{' and '.join(biases)}: of those families only Llama has biases, but {reason} needs Mistral",
    )
    yield (
        c.attention_logit_softcap is not None,
        f"attention_logit_softcap is {c.attention_logit_softcap}, those families have none",
    )
    yield (
        c.attention_prune_below > 0,
        f"attention_prune_below is {c.attention_prune_below}, those families leave no keys out",
    )
    # A memory gives the layers windows of its own.
    yield c.has_memory, "memory.length is given, those families remember nothing beyond their cache"
    yield (
        not c.has_memory and len(set(c.windows)) > 1,
        "layer_types mixes full and sliding attention, there all layers are alike",
    )
    yield c.sink_tokens > 0, f"sink_tokens is {c.sink_tokens}, a window there hides a document's first tokens too"
    yield c.parallel_residual, "parallel_residual is true, there the MLP comes after attention"
    yield (
        c.residual_scaling != "none",
        f"residual_scaling is {c.residual_scaling!r}, those families add branches as they are",
    )
    yield c.layer_scale_init is not None, "layer_scale_init is given, those families scale no channels of a branch"

"""One table per family: where each weight lies and what each setting is called in a Hugging Face checkpoint.

The same table is read both ways. ``{i}`` in a name is the layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.layout import SAME, SPLIT_INPUT, SPLIT_OUTPUT, Layout
from stellarbyte_jax.model.cache import pattern


@dataclass(frozen=True)
class Row:
    """One weight: our path, their name, and the layout between them.

    Attributes:
      ours: path in the parameter tree; ``layers/...`` leaves out the place in the layer pattern.
      theirs: name in the checkpoint.
      layout: from one to the other.
      slot: index in the axis "gate" of ``gate_up``, which is two tensors of theirs.
      rotary: the last axis of ours is turned in pairs.
    """

    ours: str
    theirs: str
    layout: Layout
    slot: int | None = None
    rotary: bool = False


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
      fixed: their fields that may only have the values listed (the first is the default).
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    buffers: tuple[str, ...]
    settings: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def entries(self, config: ByteConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
        """Every tensor of a checkpoint, layer after layer, for the leaves whose ``shapes`` are given by path."""
        period = len(pattern(config))
        stacked = [row for row in self.rows if row.ours.startswith("layers/")]
        for row in self.rows:
            if row.ours in shapes:  # no head where it is tied
                yield Entry(row.ours, (), shapes[row.ours], row.theirs, row)
        for i in range(config.num_hidden_layers):
            for row in stacked:
                path = row.ours.replace("layers/", f"layers/{i % period}/", 1)
                shape = shapes[path][1:]
                index: tuple[int | slice, ...] = (i // period,)
                if row.slot is not None:
                    index, shape = (i // period, slice(None), row.slot), (shape[0], *shape[2:])
                yield Entry(path, index, shape, row.theirs.format(i=i), row)


_LLAMA_ROWS = (
    Row("embed/embedding", "model.embed_tokens.weight", SAME),
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
    Row("lm_head/kernel", "lm_head.weight", SPLIT_OUTPUT),
)
_ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=_LLAMA_ROWS,
    buffers=_ROTARY_BUFFERS,
    settings={
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
    },
    # attention_bias would put a bias on the output projection too, which ByteConfig.attention_bias does not.
    fixed={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1, None),
        "rope_interleaved": (False, None),
    },
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=_LLAMA_ROWS,
    buffers=_ROTARY_BUFFERS,
    settings={
        **LLAMA.settings,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    fixed=LLAMA.fixed,
)
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL)}


def export_family(config: ByteConfig) -> Family:
    """The family that computes exactly what ``config`` says, the most widely read one first.

    Raises:
      ValueError: there is none; the message names each setting that stands in the way and what to do.
    """
    obstacles = []
    if config.position_embedding != "rope":
        obstacles.append(f"position_embedding is {config.position_embedding!r}, only 'rope' exists there")
    if config.rms_norm_eps_rule != "add":
        obstacles.append(f"rms_norm_eps_rule is {config.rms_norm_eps_rule!r}, only 'add' exists there")
    if config.qk_norm:
        obstacles.append("qk_norm is true, those families have no norm on queries and keys")
    if config.attention_bias:
        obstacles.append("attention_bias is true, which there means a bias on the output projection too")
    if config.attention_logit_softcap is not None:
        obstacles.append(f"attention_logit_softcap is {config.attention_logit_softcap}, those families have none")
    windows = set(config.windows)
    if len(windows) > 1:
        obstacles.append("layer_types mixes full and sliding attention, there all layers are alike")
    if obstacles:
        raise ValueError(
            f"no Hugging Face family of {', '.join(FAMILIES)} can express this model: {'; '.join(obstacles)}. "
            "Keep it as a checkpoint of this project, or train with the settings of those families"
        )
    # transformers 5 refuses a Llama whose hidden size is not a multiple of its heads; Mistral is the same network.
    divides = config.hidden_size % config.num_attention_heads == 0
    return LLAMA if windows == {None} and divides else MISTRAL

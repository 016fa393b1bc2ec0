"""Our own network, with the modelling file for transformers that goes with its weights."""

from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.layout import EXPERTS_DOWN, EXPERTS_GATE_UP, FLAT, SAME, SPLIT_INPUT, SPLIT_OUTPUT
from stellarbyte_jax.hf.table import Family, Field, Row, same

_DEFAULTS = ByteConfig()
_LAYER = "model.layers.{i}."
_SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_style", "max_position_embeddings"),
    *("tie_word_embeddings", "position_embedding", "rope_pairing", "xpos_scale_base", "xpos_learnable"),
    *("rms_norm_eps", "rms_norm_eps_rule", "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm"),
    *("parallel_residual", "residual_scaling", "drop_path", "initializer_range"),
    *("attention_dropout", "hidden_dropout", "residual_dropout"),
)
_MAYBE_NULL = ("attention_logit_softcap", "layer_scale_init", "initialization")


def _read_windows(values: Mapping[str, Any]) -> Mapping[str, Any]:
    windows = values["attention_windows"]
    if windows is None:
        windows = []
    if not (isinstance(windows, list) and all(window is None or type(window) is int for window in windows)):
        raise ValueError(f"attention_windows must be a list of numbers and nulls, got {shown(windows)}")
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise ValueError(f"attention_windows has windows of {shown(sizes)} tokens: one size is implemented")
    told = {"layer_types": values["layer_types"], "sliding_window": values["sliding_window"]}
    expected = _for_caches(tuple(windows), values["sink_tokens"])
    for name, value in told.items():
        if windows and value not in (None, expected[name]):
            raise ValueError(f"{name} and attention_windows contradict each other: change attention_windows alone")
    if not sizes:
        return {}
    types = tuple(llama_like.layer_types(tuple(windows)))
    return {"sliding_window": sizes[0], "layer_types": types if None in windows else None}


def _for_caches(windows: tuple[int | None, ...], sink_tokens: Any) -> dict[str, Any]:
    """What the caches of transformers may drop: nothing where the first tokens stay visible."""
    droppable = tuple(None if sink_tokens else window for window in windows)
    return {
        "layer_types": llama_like.layer_types(droppable),
        "sliding_window": next((window for window in droppable if window is not None), None),
    }


_WINDOWS = Field(
    {"attention_windows": None, "layer_types": None, "sliding_window": None, "sink_tokens": 0},
    lambda values: {"sink_tokens": values["sink_tokens"], **_read_windows(values)},
    lambda config: {
        "attention_windows": list(config.windows),
        "sink_tokens": config.sink_tokens,
        **_for_caches(config.windows, config.sink_tokens),
    },
    ("attention_windows", "layer_types", "sliding_window"),
)


def _read_experts(values: Mapping[str, Any]) -> Mapping[str, Any]:
    moe = values["moe"]
    if not isinstance(moe, dict | None):
        raise ValueError(f"moe must be an object with the settings of experts, got {shown(moe)}")
    return {} if moe is None else {"moe": moe}


# All of their settings, those of training too, which transformers keeps and does not read.
_EXPERT_SETTINGS = Field(
    {"moe": None},
    _read_experts,
    lambda config: {"moe": config.moe.to_dict() if config.moe.num_experts else None},
    ("moe",),
)
_ROUTER, _CONTEXT = "layers/moe/router/", _LAYER + "mlp.router.context."
_CONTEXT_MATRICES = ("context_in", "context_out", "mlp_gate", "mlp_up", "mlp_down")
_TRACKED = ("load", "utilization", "priority", "bias", "coldness", "steps", "twin", "twin_steps")
_ROUTER_ROWS = (
    Row(_ROUTER + "kernel", _LAYER + "mlp.router.weight", SPLIT_OUTPUT, float32=True),
    Row(_ROUTER + "temperature", _LAYER + "mlp.router.temperature", FLAT, float32=True),
    Row(_ROUTER + "noise", _LAYER + "mlp.router.noise", SPLIT_OUTPUT, float32=True),
    *(Row(_ROUTER + name, _CONTEXT + name, SPLIT_OUTPUT, float32=True) for name in _CONTEXT_MATRICES),
    Row(_ROUTER + "position", _CONTEXT + "position", SAME, float32=True),
    Row(_ROUTER + "norm/scale", _CONTEXT + "norm.weight", SAME, float32=True),
    *(Row(f"{_ROUTER}tracked/{name}", f"{_LAYER}mlp.router.{name}", FLAT, float32=True) for name in _TRACKED),
)
_EXPERT_ROWS = (
    Row("layers/moe/experts/gate_up", _LAYER + "mlp.experts.gate_up_proj", EXPERTS_GATE_UP),
    Row("layers/moe/experts/down", _LAYER + "mlp.experts.down_proj", EXPERTS_DOWN),
    Row("layers/pool/gate_up", "model.experts.gate_up_proj", EXPERTS_GATE_UP),
    Row("layers/pool/down", "model.experts.down_proj", EXPERTS_DOWN),
    Row("layers/moe/shared/gate_up", _LAYER + "mlp.shared_experts.gate_proj.weight", SPLIT_OUTPUT, slot=0),
    Row("layers/moe/shared/gate_up", _LAYER + "mlp.shared_experts.up_proj.weight", SPLIT_OUTPUT, slot=1),
    Row("layers/moe/shared/down", _LAYER + "mlp.shared_experts.down_proj.weight", SPLIT_INPUT),
)


def _limit(config: ByteConfig) -> str | None:
    if config.moe.history_decay:
        return "moe.history_decay is not 0, and no cache of transformers keeps the mean of earlier tokens that it reads"
    return None


STELLARBYTE = Family(
    model_type="stellarbyte",
    architecture="StellarByteForCausalLM",
    rows=(
        *llama_like.DECODER_ROWS,
        *llama_like.QKV_BIAS_ROWS,
        *llama_like.O_BIAS_ROWS,
        *llama_like.MLP_BIAS_ROWS,
        *llama_like.QK_NORM_ROWS,
        Row("layers/attn/xpos_rate", _LAYER + "self_attn.xpos_rate", SAME, float32=True),
        Row("layers/mlp/norm/scale", _LAYER + "mlp.norm.weight", SAME),
        Row("layers/attn_scale", _LAYER + "attn_scale", SAME),
        Row("layers/mlp_scale", _LAYER + "mlp_scale", SAME),
        *_ROUTER_ROWS,
        *_EXPERT_ROWS,
    ),
    buffers=(),
    fields=(
        *(same(name, getattr(_DEFAULTS, name)) for name in _SETTINGS),
        *(same(name, getattr(_DEFAULTS, name), nullable=True) for name in _MAYBE_NULL),
        llama_like.mlp_size(None, nullable=True),
        llama_like.kv_heads(None, nullable=True),
        llama_like.head_size(None, nullable=True),
        llama_like.ACTIVATION,
        _WINDOWS,
        _EXPERT_SETTINGS,
    ),
    limit=_limit,
    pairings=("half", "interleaved"),
    modelling_file="modeling_stellarbyte.py",
)

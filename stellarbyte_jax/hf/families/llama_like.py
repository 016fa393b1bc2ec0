"""Names that checkpoints took over from Llama: rows and fields that several families have."""

from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.hf.layout import FLAT, SAME, SPLIT_INPUT, SPLIT_OUTPUT
from stellarbyte_jax.hf.table import Field, Row, same

# Their names for activations, by the function that they compute; the first one is written.
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_pytorch_tanh": ("gelu_pytorch_tanh", "gelu_new"),
}
_LAYER = "model.layers.{i}."

OUTSIDE_ROWS = (
    Row("embed/embedding", "model.embed_tokens.weight", SAME, vocab=0),
    Row("final_norm/scale", "model.norm.weight", SAME),
    Row("lm_head/kernel", "lm_head.weight", SPLIT_OUTPUT, vocab=1),
)
NORM_ROWS = (
    Row("layers/attn_norm/scale", _LAYER + "input_layernorm.weight", SAME),
    Row("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", SAME),
)
O_ROWS = (Row("layers/attn/o", _LAYER + "self_attn.o_proj.weight", SPLIT_INPUT),)
DOWN_ROWS = (Row("layers/mlp/down", _LAYER + "mlp.down_proj.weight", SPLIT_INPUT),)
QKV_ROWS = (
    Row("layers/attn/q", _LAYER + "self_attn.q_proj.weight", SPLIT_OUTPUT, rotary=True),
    Row("layers/attn/k", _LAYER + "self_attn.k_proj.weight", SPLIT_OUTPUT, rotary=True),
    Row("layers/attn/v", _LAYER + "self_attn.v_proj.weight", SPLIT_OUTPUT),
)
GATE_UP_ROWS = (
    Row("layers/mlp/gate_up", _LAYER + "mlp.gate_proj.weight", SPLIT_OUTPUT, slot=0),
    Row("layers/mlp/gate_up", _LAYER + "mlp.up_proj.weight", SPLIT_OUTPUT, slot=1),
)
QKV_BIAS_ROWS = (
    Row("layers/attn/q_bias", _LAYER + "self_attn.q_proj.bias", FLAT, rotary=True),
    Row("layers/attn/k_bias", _LAYER + "self_attn.k_proj.bias", FLAT, rotary=True),
    Row("layers/attn/v_bias", _LAYER + "self_attn.v_proj.bias", FLAT),
)
O_BIAS_ROWS = (Row("layers/attn/o_bias", _LAYER + "self_attn.o_proj.bias", FLAT),)
MLP_BIAS_ROWS = (
    Row("layers/mlp/gate_up_bias", _LAYER + "mlp.gate_proj.bias", FLAT, slot=0),
    Row("layers/mlp/gate_up_bias", _LAYER + "mlp.up_proj.bias", FLAT, slot=1),
    Row("layers/mlp/down_bias", _LAYER + "mlp.down_proj.bias", FLAT),
)
QK_NORM_ROWS = (
    Row("layers/attn/q_norm/scale", _LAYER + "self_attn.q_norm.weight", SAME, rotary=True),
    Row("layers/attn/k_norm/scale", _LAYER + "self_attn.k_norm.weight", SAME, rotary=True),
)
ATTENTION_ROWS = (*OUTSIDE_ROWS, *NORM_ROWS, *QKV_ROWS, *O_ROWS)
DECODER_ROWS = (*ATTENTION_ROWS, *DOWN_ROWS, *GATE_UP_ROWS)
ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

FIXED: Mapping[str, tuple[Any, ...]] = {"pretraining_tp": (1, None), "rope_interleaved": (False, None)}
NO_BIASES: Mapping[str, tuple[Any, ...]] = {"attention_bias": (False, None), "mlp_bias": (False, None)}


def activation_name(name: Any) -> str:
    """Our name of an activation of theirs; raises ValueError where it is none that is implemented."""
    for ours, theirs in _ACTIVATIONS.items():
        if name in theirs:
            return ours
    supported = [name for theirs in _ACTIVATIONS.values() for name in theirs]
    raise ValueError(f"hidden_act is {shown(name)}; supported are {', '.join(supported)}")


ACTIVATION = Field(
    {"hidden_act": "silu"},
    lambda values: {"hidden_act": activation_name(values["hidden_act"])},
    lambda config: {"hidden_act": _ACTIVATIONS[config.hidden_act][0]},
)
# Their attention_bias is a bias on q, k, v and the output projection.
ATTENTION_BIAS = Field(
    {"attention_bias": False},
    lambda values: dict.fromkeys(("attention_bias", "attention_output_bias"), values["attention_bias"]),
    lambda config: {"attention_bias": config.attention_bias},
)


def mlp_size(default: int | None, *, nullable: bool = False) -> Field:
    """The field ``intermediate_size``."""
    return same("intermediate_size", default, derived=lambda config: config.mlp_size, nullable=nullable)


def kv_heads(default: int | None, *, nullable: bool) -> Field:
    """The field ``num_key_value_heads``."""
    return same("num_key_value_heads", default, derived=lambda config: config.kv_heads, nullable=nullable)


def head_size(default: int | None, *, nullable: bool) -> Field:
    """The field ``head_dim``."""
    return same("head_dim", default, derived=lambda config: config.head_size, nullable=nullable)


def one_window(default: int | None) -> Field:
    """The field ``sliding_window`` of families whose layers are alike."""
    return same("sliding_window", default, derived=lambda config: config.windows[0], nullable=True)


def _read_pattern(values: Mapping[str, Any]) -> Mapping[str, Any]:
    types, window, layers = values["layer_types"], values["sliding_window"], values["num_hidden_layers"]
    if not isinstance(types, list | None):
        raise ValueError(f"layer_types must be a list of names, got {shown(types)}")
    if not values["use_sliding_window"]:
        window = None
        if types and "sliding_attention" in types:
            raise ValueError("layer_types asks for sliding_attention, and use_sliding_window is false: change one")
    if types is None and window is not None:
        first = values["max_window_layers"]
        if not (isinstance(first, int) and isinstance(layers, int)):
            raise ValueError(f"max_window_layers must be a number of layers, got {shown(first)}")
        layers = min(layers, 4096)  # more are refused elsewhere
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if types is None or "sliding_attention" not in types:
        unknown = [name for name in types or [] if name != "full_attention"]
        if unknown:
            raise ValueError(f"layer_types names {shown(unknown[0])}: full_attention and sliding_attention are known")
        return {"sliding_window": None, "layer_types": None}
    return {"sliding_window": window, "layer_types": tuple(types)}


def _write_pattern(config: ByteConfig) -> Mapping[str, Any]:
    windows = config.windows
    first = next((i for i, window in enumerate(windows) if window is not None), len(windows))
    return {
        "use_sliding_window": first < len(windows),
        "sliding_window": next((window for window in windows if window is not None), None),
        "max_window_layers": first,  # read by versions that do not know layer_types
        "layer_types": layer_types(windows),
    }


def layer_types(windows: tuple[int | None, ...]) -> list[str]:
    """What transformers calls layers with these windows."""
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


# Families whose layers have windows from one layer on, or by a list.
WINDOW_PATTERN = Field(
    {
        "num_hidden_layers": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    lambda values: {"num_hidden_layers": values["num_hidden_layers"], **_read_pattern(values)},
    lambda config: {"num_hidden_layers": config.num_hidden_layers, **_write_pattern(config)},
    ("sliding_window", "layer_types"),
)

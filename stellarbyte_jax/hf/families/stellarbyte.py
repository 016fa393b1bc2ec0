"""Our own network, with the modelling file for transformers that goes with its weights."""

from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.layout import SAME
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
    ),
    pairings=("half", "interleaved"),
    modelling_file="modeling_stellarbyte.py",
)

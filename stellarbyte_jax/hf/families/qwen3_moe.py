"""Qwen3 with experts. Yang et al. 2025, https://arxiv.org/abs/2505.09388."""

from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.hf.families import experts, llama_like
from stellarbyte_jax.hf.table import Family, Field, same


def _read_experts(values: Mapping[str, Any]) -> Mapping[str, Any]:
    named = values["mlp_only_layers"]
    if not isinstance(named, list | None):
        raise ValueError(f"mlp_only_layers must be a list of layers, got {shown(named)}")
    return {
        "moe": {
            "num_experts": experts.read_count(values, 128),
            "num_experts_per_tok": values["num_experts_per_tok"],
            "intermediate_size": values["moe_intermediate_size"],
            "decoder_sparse_step": values["decoder_sparse_step"],
            "mlp_only_layers": named or [],
            "norm_topk_prob": values["norm_topk_prob"],
        }
    }


def _write_experts(config: ByteConfig) -> Mapping[str, Any]:
    c = config.moe
    return {
        "num_experts": c.num_experts,  # read by release 4 of transformers
        "num_local_experts": c.num_experts,  # written by later ones
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": config.expert_size,
        "decoder_sparse_step": c.decoder_sparse_step,
        "mlp_only_layers": sorted({*c.mlp_only_layers, *range(min(c.first_k_dense_replace, config.num_hidden_layers))}),
        "norm_topk_prob": c.norm_topk_prob,
    }


def _read_window(values: Mapping[str, Any]) -> Mapping[str, Any]:
    window = values["sliding_window"] if values["use_sliding_window"] else None
    if window is not None and values["max_window_layers"] not in (None, 0):
        raise ValueError(
            f"max_window_layers is {shown(values['max_window_layers'])}: releases of transformers differ in what it "
            "means here: remove it, if all layers have the window"
        )
    return {"sliding_window": window}


def _write_window(config: ByteConfig) -> Mapping[str, Any]:
    window = config.windows[0]
    return {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=(
        *llama_like.DECODER_ROWS,
        *experts.listed_rows("model.layers.{i}.mlp", "gate_proj", "up_proj", "down_proj"),
        *llama_like.QK_NORM_ROWS,
        *llama_like.QKV_BIAS_ROWS,
        *llama_like.O_BIAS_ROWS,
    ),
    fused=experts.FUSED_ROWS,
    buffers=llama_like.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 151936),
        same("hidden_size", 2048),
        llama_like.mlp_size(6144),
        same("num_hidden_layers", 24),
        same("num_attention_heads", 32),
        llama_like.kv_heads(4, nullable=False),
        llama_like.head_size(None, nullable=False),
        llama_like.ACTIVATION,
        same("max_position_embeddings", 32768),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-6),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        llama_like.ATTENTION_BIAS,
        # One window for all layers.
        Field(
            {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": None},
            _read_window,
            _write_window,
            ("sliding_window", "max_window_layers"),
        ),
        Field(
            {
                **experts.COUNT_DEFAULTS,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "decoder_sparse_step": 1,
                "mlp_only_layers": None,
                "norm_topk_prob": False,
            },
            _read_experts,
            _write_experts,
            ("mlp_only_layers",),
        ),
    ),
    constants={"qk_norm": True},
    fixed={**llama_like.FIXED, "mlp_bias": (False, None)},
    told=experts.TOLD,
    limit=experts.no_experts,
)

"""Mixtral: Mistral whose layers all have experts. Jiang et al. 2024, https://arxiv.org/abs/2401.04088."""

from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.families import experts, llama_like
from stellarbyte_jax.hf.layout import SPLIT_OUTPUT
from stellarbyte_jax.hf.table import Family, Field, Row, same


def _read(values: Mapping[str, Any]) -> Mapping[str, Any]:
    # The softmax over the scores of the chosen experts is that over all of them, divided by their sum.
    count = experts.read_count(values, 8)
    return {
        "intermediate_size": values["intermediate_size"],
        "moe": {"num_experts": count, "num_experts_per_tok": values["num_experts_per_tok"]},
    }


def _write(config: ByteConfig) -> Mapping[str, Any]:
    return {
        "intermediate_size": config.expert_size,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.num_experts_per_tok,
    }


def _limit(config: ByteConfig) -> str | None:
    if config.moe.num_experts and len(config.moe_layers) < config.num_hidden_layers:
        return "some layers have one MLP, there all have experts"
    return experts.no_experts(config)


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(
        *llama_like.ATTENTION_ROWS,
        *experts.listed_rows("model.layers.{i}.block_sparse_moe", "w1", "w3", "w2"),
    ),
    fused=(Row(experts.ROUTER, "model.layers.{i}.mlp.gate.weight", SPLIT_OUTPUT), *experts.FUSED_ROWS),
    buffers=llama_like.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 32000),
        same("hidden_size", 4096),
        Field({"intermediate_size": 14336, "num_experts_per_tok": 2, **experts.COUNT_DEFAULTS}, _read, _write),
        same("num_hidden_layers", 32),
        same("num_attention_heads", 32),
        llama_like.kv_heads(8, nullable=False),
        llama_like.head_size(None, nullable=True),
        llama_like.ACTIVATION,
        same("max_position_embeddings", 131072),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-5),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        llama_like.one_window(None),
    ),
    fixed={**llama_like.FIXED, **llama_like.NO_BIASES},
    told=experts.TOLD,
    rope_theta=1e6,
    limit=_limit,
)

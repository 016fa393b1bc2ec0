"""What ``benchmark moe`` measures: training with experts, by dispatch, beside the same shape in transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from stellarbyte_jax.cli.measurements import synthetic
from stellarbyte_jax.cli.torch_peers import train_peer
from stellarbyte_jax.command import MendableError, imports
from stellarbyte_jax.config import TrainConfig


def _ours(dispatch: Literal["dropless", "capacity"]) -> Callable[[TrainConfig, int], dict[str, Any]]:
    def measure(config: TrainConfig, steps: int, profile: Path | None = None) -> dict[str, Any]:
        moe = replace(_checked(config).model.moe, dispatch=dispatch)
        return synthetic(replace(config, model=replace(config.model, moe=moe)), steps, profile)

    return measure


def _huggingface(dtype: Literal["float32", "bfloat16"]) -> Callable[[TrainConfig, int], dict[str, Any]]:
    def measure(config: TrainConfig, steps: int) -> dict[str, Any]:
        """The Qwen3-MoE of this shape, with its grouped products where there is a GPU."""
        c = _checked(config).model
        with imports():
            import torch
            import transformers

        make: Any = transformers.Qwen3MoeConfig
        settings = make(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.mlp_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_size,
            hidden_act=c.hidden_act,
            max_position_embeddings=c.max_position_embeddings,
            tie_word_embeddings=c.tie_word_embeddings,
            num_experts=c.moe.num_experts,
            num_experts_per_tok=c.moe.num_experts_per_tok,
            moe_intermediate_size=c.expert_size,
            mlp_only_layers=[layer for layer in range(c.num_hidden_layers) if layer not in c.moe_layers],
            norm_topk_prob=c.moe.norm_topk_prob,
            output_router_logits=True,
            use_cache=False,
        )
        torch.manual_seed(0)
        experts = "grouped_mm" if torch.cuda.is_available() else "eager"
        model = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, dtype), experts_implementation=experts
        )
        return {**train_peer(config, steps, model), "experts": experts, "weights": dtype}

    return measure


def _checked(config: TrainConfig) -> TrainConfig:
    if not config.model.moe.num_experts:
        raise MendableError("benchmark moe needs a config with experts: --config pretrain_moe")
    return config


PEERS = dict.fromkeys(("dropless", "capacity"), ("huggingface_moe", "huggingface_moe_bfloat16"))
WORKERS = {
    "dropless": _ours("dropless"),
    "capacity": _ours("capacity"),
    "huggingface_moe": _huggingface("float32"),
    "huggingface_moe_bfloat16": _huggingface("bfloat16"),
}

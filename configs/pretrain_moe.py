"""Pretraining of a model with experts: 1.3B parameters, 220M of them for a token (1024 x 12, 64 experts of 512, top 8).

    python scripts/train.py --config configs/pretrain_moe.py --set 'data.train=corpus/*.jsonl' data.validation=v.jsonl

Hardware: one GPU with 80 GB. Speed: 242,600 tokens/s and 56.8 GiB on an H100 (random tokens, jax 0.11.2,
2026-11-28: docs/performance.md); global_batch_size=8 needs half the memory. Balance: a loss of the load of each
part of the batch; loss.router_load=0 model.moe.bias_update_rate=0.001 loss.router_sequence=0.0001 is DeepSeek-V3's way
without one.

Qwen3-MoE: Yang et al. 2025, https://arxiv.org/abs/2505.09388; fine-grained experts: Dai et al. 2024,
https://arxiv.org/abs/2401.06066.
"""

from stellarbyte_jax.config import (
    ByteConfig,
    DataConfig,
    LossConfig,
    MoEConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    beside,
)


def config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        output_dir="runs/pretrain_moe",
        steps=20_000,
        global_batch_size=32,
        model=ByteConfig(
            vocab_size=32000,
            hidden_size=1024,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=4096,
            max_position_embeddings=2048,
            qk_norm=True,
            scan_unroll=None,
            moe=MoEConfig(num_experts=64, num_experts_per_tok=8, intermediate_size=512),
        ),
        data=DataConfig(
            train=(beside(__file__, "../data/tiny_bilingual_train.jsonl"),),
            validation=(beside(__file__, "../data/tiny_bilingual_valid.jsonl"),),
            tokenizer=beside(__file__, "../tokenizer"),
            sequence_length=2048,
            workers=2,
        ),
        loss=LossConfig(router_load=0.01, router_z=0.001),
        optimizer=OptimizerConfig(learning_rate=4e-4),
        schedule=ScheduleConfig(warmup_steps=1000),
    )

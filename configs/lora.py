"""Fine-tuning with adapters: configs/sft.py with low-rank adapters in place of all weights.

    python scripts/train.py --config configs/quickstart.py
    python scripts/train.py --config configs/lora.py
    python scripts/generate.py --model runs/lora --chat

Hardware: a CPU. Checkpoints hold the adapters and their optimizer alone: the weights that `init_from` names have to
stay where they are. Those of `runs/lora/hf` have the adapters in them. Paper: https://arxiv.org/abs/2106.09685, see
docs/lora.md.
"""

from dataclasses import replace

from stellarbyte_jax.config import ByteConfig, LoRAConfig, OptimizerConfig, TrainConfig

from .sft import config as sft


def config() -> TrainConfig:
    """The run."""
    return replace(
        sft(),
        output_dir="runs/lora",
        model=ByteConfig(lora=LoRAConfig(r=16, lora_alpha=32.0, base_dtype="bfloat16")),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.0),
    )

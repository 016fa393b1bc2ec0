"""A first run with experts on the embedded bilingual corpus: configs/quickstart.py with as many active weights.

    python scripts/train.py --config configs/quickstart_moe.py

Hardware: a CPU. Each layer has 8 experts of 192 channels, of which a token takes 2. Ends with a picture of how the load
was spread (experts.png), samples, a checkpoint and a Hugging Face directory under runs/quickstart_moe.

Mixtral: Jiang et al. 2024, https://arxiv.org/abs/2401.04088; Muon: Liu et al. 2025, https://arxiv.org/abs/2502.16982.
"""

import dataclasses

from stellarbyte_jax.config import MoEConfig, TrainConfig

from .quickstart import config as quickstart


def config() -> TrainConfig:
    """The run."""
    run = quickstart()
    moe = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=192)
    return dataclasses.replace(run, output_dir="runs/quickstart_moe", model=dataclasses.replace(run.model, moe=moe))

"""The StellarByte decoder, 162M parameters, with the settings that paid in our ablation (see the README).

    python scripts/train.py --config configs/stellarbyte.py --set 'data.train=corpus/*.jsonl'

The run of configs/pretrain.py otherwise. Hardware: one GPU with 80 GB. Speed: 392,000 tokens/s on one H100 80 GB with
jax 0.11.2, packed documents, the median of the run below; 20,000 steps take 28 minutes at that. Loss: without settings
it trains on the embedded corpus; with steps=250 schedule.warmup_steps=100 evaluation.interval=125 the validation loss
was 5.45 after 125 steps and 5.68 after 250.

XPos: Sun et al. 2022, https://arxiv.org/abs/2212.10554; LayerScale: Touvron et al. 2021, https://arxiv.org/abs/2103.17239.
"""

import dataclasses

from stellarbyte_jax.config import ByteConfig, TrainConfig

from .pretrain import config as pretrain


def config() -> TrainConfig:
    """The run."""
    run = pretrain()
    model: ByteConfig = dataclasses.replace(
        run.model,
        position_embedding="xpos",
        parallel_residual=True,
        layer_scale_init=1e-5,
        qk_norm=True,
    )
    return dataclasses.replace(run, output_dir="runs/stellarbyte", model=model, export_at_end=True)

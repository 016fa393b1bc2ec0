"""The StellarByte decoder, 162M parameters, with the settings that paid in our ablation (see the README).

    python scripts/train.py --config configs/stellarbyte.py --set 'data.train=corpus/*.jsonl'

The run of configs/pretrain.py otherwise: one GPU with 80 GB; without settings it trains on the embedded corpus.
"""

import dataclasses

from stellarbyte_jax.config import ByteConfig, TrainConfig, load


def config() -> TrainConfig:
    """The run."""
    run = load("configs/pretrain.py")
    model: ByteConfig = dataclasses.replace(
        run.model,
        position_embedding="xpos",
        parallel_residual=True,
        layer_scale_init=1e-5,
        qk_norm=True,
    )
    return dataclasses.replace(run, output_dir="runs/stellarbyte", model=model)

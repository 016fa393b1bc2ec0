"""Did numbers move? The first losses of a small model with the project's own features, against trusted ones."""

import json
import os
from pathlib import Path

import jax
import numpy as np

from stellarbyte_jax.config import ByteConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.data.loader import make_loader
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.train.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.train.state import create_state
from stellarbyte_jax.train.step import make_train_step

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "losses.json"


def test_losses_are_the_trusted_ones(tmp_path):
    """Twelve steps on the embedded corpus: XPos, GEGLU, windows, q/k norm, packing, cosine, AdamW."""
    config = TrainConfig(
        output_dir="unused",
        steps=12,
        global_batch_size=4,
        model=ByteConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            position_embedding="xpos",
            hidden_act="gelu_pytorch_tanh",
            sliding_window=24,
            layer_types=("sliding_attention", "full_attention"),
            qk_norm=True,
            compute_dtype="float32",
        ),
        data=DataConfig(
            train=(str(ROOT / "data" / "tiny_bilingual_valid.jsonl"),),
            tokenizer=str(ROOT / "tokenizer"),
            sequence_length=64,
            workers=0,
            cache_dir=str(tmp_path),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=4),
    )
    with (
        jax.numpy_dtype_promotion("standard"),
        make_loader(config.data, split="train", batch_size=4, seed=0) as batches,
    ):
        model = ByteTransformer(config.model)
        optimizer = make_optimizer(config, model)
        state = create_state(config, model, optimizer)
        step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config)))
        losses = []
        for _ in range(12):
            state, metrics = step(state, next(batches))
            losses.append(round(float(metrics["loss"]), 5))
    if os.environ.get("STELLARBYTE_RENEW_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    trusted = json.loads(GOLDEN.read_text())["losses"]
    np.testing.assert_allclose(
        losses,
        trusted,
        atol=2e-3,
        err_msg=(
            "The first losses moved. If the change was not meant to move them, it is wrong: find out why. If it was, "
            "say so in the commit and renew the file: STELLARBYTE_RENEW_GOLDEN=1 python -m pytest tests/test_golden.py"
        ),
    )

"""Did numbers move? The first losses of a small model with the project's own features, against trusted ones."""

import json
import os
from pathlib import Path

import jax
import numpy as np
from helpers.groups import one_group_each, stacked

from stellarbyte_jax.config import ByteConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.data.loader import make_loader
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.training.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.training.state import create_state
from stellarbyte_jax.training.step import make_train_step

ROOT = Path(__file__).parents[2]
# Steps until which the last bit of a sum does not matter; then the gradient becomes large and makes much of it.
STEADY = 9
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
RENEW = (
    "The first losses moved. If the change was not meant to move them, it is wrong: find out why. If it was, say so in "
    "the commit and renew the file: STELLARBYTE_RENEW_GOLDEN=1 python -m pytest tests/training/test_golden.py"
)


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
    model = ByteTransformer(config.model)
    # The trusted run began with the weights of layers that were each a group of their own.
    with one_group_each():
        apart = jax.jit(lambda: init_params(model, jax.random.key(config.seed)))()
    with make_loader(config.data, split="train", batch_size=4, seed=0) as batches:
        optimizer = make_optimizer(config, model)
        state = jax.jit(lambda: create_state(config, model, optimizer))().replace(params=stacked(apart))
        step = make_train_step(config, model, optimizer, make_schedule(config))
        # The trusted numbers are of XLA's usual machine code; the other tests do with less of it.
        step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 3})
        losses, norms = [], []
        for _ in range(12):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["gradient_norm"]))
    if os.environ.get("STELLARBYTE_RENEW_GOLDEN") == "1":
        renewed = {"jax": jax.__version__, "losses": losses, "gradient_norms": norms[:STEADY]}
        GOLDEN.write_text(json.dumps(renewed, indent=1) + "\n", encoding="utf-8")
    trusted = json.loads(GOLDEN.read_text(encoding="utf-8"))
    np.testing.assert_allclose(losses, trusted["losses"], atol=2e-3, err_msg=RENEW)
    if jax.__version__ == trusted["jax"]:  # another one may add in another order
        steady, late = slice(None, STEADY), slice(STEADY, None)
        np.testing.assert_allclose(losses[steady], trusted["losses"][steady], rtol=1e-6, err_msg=RENEW)
        np.testing.assert_allclose(losses[late], trusted["losses"][late], rtol=1e-5, err_msg=RENEW)
        np.testing.assert_allclose(norms[steady], trusted["gradient_norms"], rtol=1e-5, err_msg=RENEW)

"""A tiny model, batches and compiled steps for tests of training."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from stellarbyte_jax.config import ByteConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.trees import IsTrainable, all_trainable
from stellarbyte_jax.training.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.training.state import TrainState, create_state
from stellarbyte_jax.training.step import make_train_step

MODEL = ByteConfig(
    vocab_size=67,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    compute_dtype="float32",
)


def settings(**changes) -> TrainConfig:
    base = TrainConfig(
        output_dir="unused",
        steps=50,
        global_batch_size=4,
        model=MODEL,
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=5),
    )
    return dataclasses.replace(base, **changes)


def packed_batch(seed=0, batch=4, length=16) -> dict[str, np.ndarray]:
    """Rows of two documents and some padding, the way the data pipeline makes them."""
    random = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    positions = np.zeros((batch, length), np.int32)
    for row in range(batch):
        cut, end = random.integers(3, 7), random.integers(10, length + 1)
        ids[row, :cut], ids[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
    return {
        "tokens": random.integers(0, MODEL.vocab_size, (batch, length), dtype=np.int32),
        "segment_ids": ids,
        "positions": positions,
        "loss_mask": (ids > 0) & (positions > 0) & (random.random((batch, length)) > 0.2),
    }


def some_weights(config: ByteConfig, seed=3) -> dict[str, Any]:
    """Random weights of a network, float32 in numpy's memory; made without a program."""
    numbers = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.float32(0.1) * numbers.standard_normal(leaf.shape, "f4"), param_shapes(ByteTransformer(config))
    )


def rate_at(config: TrainConfig, step: int | jax.Array) -> jax.Array:
    """The learning rate of a step."""
    return jnp.asarray(make_schedule(config)(step), jnp.float32)


RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)
"""Changes no weight; its state is the last gradient."""


def first_state(config: TrainConfig, optimizer=None, is_trainable: IsTrainable = all_trainable) -> TrainState:
    """The state before the first step. It is shared between tests: do not write into its dicts."""
    return _first_state(config, optimizer, is_trainable)


def compiled_step(config: TrainConfig, optimizer=None, is_trainable: IsTrainable = all_trainable):
    """The training step, shared between tests; it leaves its arguments alone."""
    return _compiled_step(config, optimizer, is_trainable)


def start(config: TrainConfig, optimizer=None, is_trainable: IsTrainable = all_trainable):
    """The first state and the step."""
    return first_state(config, optimizer, is_trainable), compiled_step(config, optimizer, is_trainable)


@functools.cache
def _first_state(config, optimizer, is_trainable):
    model = ByteTransformer(config.model)
    optimizer = optimizer or make_optimizer(config, model, is_trainable)
    return jax.jit(lambda: create_state(config, model, optimizer, is_trainable))()


@functools.cache
def _compiled_step(config, optimizer, is_trainable):
    model = ByteTransformer(config.model)
    optimizer = optimizer or make_optimizer(config, model, is_trainable)
    return jax.jit(make_train_step(config, model, optimizer, functools.partial(rate_at, config)))


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of weights by paths like ``layers/0/attn/q``."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def nested(weights: dict[str, Any]) -> dict[str, Any]:
    """Undoes :func:`flat`."""
    return flax.traverse_util.unflatten_dict(weights, sep="/")


def assert_close(found, expected, **tolerance) -> None:
    """Compares two trees of weights, naming the path that differs."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_allclose(x, expected[path], err_msg=path, **tolerance)


RIVER = '{"text": "a river runs past the old stone bridge"}\n' * 20


def river_run(directory: Path, model: ByteConfig, tokenizer: str | Path | None = None, **changes) -> TrainConfig:
    """Settings of a run of two steps, ``directory/run``, on twenty equal lines; tokenizer None: the default."""
    (directory / "a.jsonl").write_text(RIVER)
    data = DataConfig(
        train=(str(directory / "a.jsonl"),), sequence_length=16, workers=0, cache_dir=str(directory / "cache")
    )
    if tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=str(tokenizer))
    base = TrainConfig(
        output_dir=str(directory / "run"),
        steps=2,
        global_batch_size=2,
        model=model,
        data=data,
        schedule=ScheduleConfig(name="constant", warmup_steps=0),  # any number of steps has one program
    )
    return dataclasses.replace(base, **changes)


def one_layer(output_dir, tokenizer, positions=32, add_bos=True, **changes) -> TrainConfig:
    """Settings of a run with the vocabulary of a tokenizer and one layer."""
    model = dataclasses.replace(
        MODEL,
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        intermediate_size=8,
        max_position_embeddings=positions,
    )
    data = DataConfig(sequence_length=16, tokenizer=tokenizer.path, add_bos=add_bos)
    return settings(output_dir=str(output_dir), model=model, data=data, **changes)

"""Does training use the memory: tokens that repeat what stood before the segment's edge, and nothing nearer tells."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import BASE

from stellarbyte_jax.config import DataConfig, MemoryConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.train.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.train.state import create_state
from stellarbyte_jax.train.step import make_train_step

T, PERIOD, ROWS, VOCABULARY = 8, 12, 16, 16


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes types inside."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def last_loss(length, steps=600, parts=1):
    """Mean loss of the last steps on rows that repeat themselves every PERIOD tokens, in segments of T < PERIOD."""
    model_config = dataclasses.replace(
        BASE, vocab_size=VOCABULARY, num_hidden_layers=2, hidden_size=64, memory=MemoryConfig(length=length)
    )
    config = TrainConfig(
        output_dir="unused",
        steps=steps,
        global_batch_size=ROWS,
        gradient_accumulation_steps=parts,
        model=model_config,
        data=DataConfig(sequence_length=T, arrangement="streams"),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        schedule=ScheduleConfig(warmup_steps=4),
    )
    model = ByteTransformer(model_config)
    optimizer = make_optimizer(config, model)
    state = jax.jit(lambda: create_state(config, model, optimizer))()
    step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config)), donate_argnums=0)
    random = np.random.default_rng(0)
    losses, at = [], 0
    for _ in range(steps):
        if at == 0:
            document = np.tile(random.integers(0, VOCABULARY, (ROWS, PERIOD), dtype=np.int32), (1, 4))
        batch = {
            "tokens": document[:, at : at + T],
            "positions": np.broadcast_to(np.arange(at, at + T, dtype=np.int32), (ROWS, T)),
            "segment_ids": np.ones((ROWS, T), np.int32),
        }
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        at = (at + T) % (4 * PERIOD)
    return np.mean(losses[-12:]), state


def test_loss_with_memory_is_clearly_under_loss_without():
    without, _ = last_loss(0, steps=200)
    with_memory, state = last_loss(16)
    chance = np.log(VOCABULARY)
    assert without > 0.9 * chance
    # A quarter of the tokens, the first period, cannot be known.
    assert with_memory < 0.3 * chance
    assert state.memory.batch_size == ROWS and np.all(np.asarray(state.memory.valid[0]))


def test_accumulation_carries_the_memory_of_its_rows():
    whole, a = last_loss(16, steps=6)
    parts, b = last_loss(16, steps=6, parts=4)
    assert parts == pytest.approx(whole, rel=1e-5)
    for x, y in zip(a.memory.states, b.memory.states, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    assert jnp.any(a.memory.states[0] != 0)

"""Does training use the memory? Each token repeats one before the segment's edge, and no nearer token determines it."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.training import MODEL, settings, start

from stellarbyte_jax.config import DataConfig, MemoryConfig, OptimizerConfig, ScheduleConfig

T, PERIOD, ROWS, VOCABULARY = 8, 12, 16, 16
SEGMENTS = 4 * PERIOD // T  # of a document, which repeats its period four times


def documents(steps):
    """Batches on a new first axis: rows that repeat themselves every PERIOD tokens, in segments of T < PERIOD."""
    random = np.random.default_rng(0)
    count = -(-steps // SEGMENTS)
    periods = random.integers(0, VOCABULARY, (count, ROWS, PERIOD), dtype=np.int32)
    tokens = np.tile(periods, (1, 1, 4)).reshape(count, ROWS, SEGMENTS, T)
    tokens = tokens.transpose(0, 2, 1, 3).reshape(-1, ROWS, T)[:steps]
    positions = np.arange(SEGMENTS * T, dtype=np.int32).reshape(SEGMENTS, 1, T)
    positions = np.tile(positions, (count, ROWS, 1))[:steps]
    return {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}


def last_loss(length, steps):
    """Mean loss of the last two documents' steps, and the state after them."""
    model = dataclasses.replace(
        MODEL, vocab_size=VOCABULARY, hidden_size=64, max_position_embeddings=64, memory=MemoryConfig(length=length)
    )
    config = settings(
        steps=steps,
        global_batch_size=ROWS,
        model=model,
        data=DataConfig(sequence_length=T, arrangement="contiguous"),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        schedule=ScheduleConfig(warmup_steps=4),
    )
    state, step = start(config)
    state, metrics = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))(state, documents(steps))
    return np.mean(metrics["loss"][-2 * SEGMENTS :]), state


@pytest.mark.slow
def test_loss_with_memory_is_clearly_under_loss_without():
    without, _ = last_loss(0, steps=200)
    with_memory, state = last_loss(16, steps=800)
    chance = np.log(VOCABULARY)
    assert without > 0.9 * chance
    # A quarter of the tokens, the first period, cannot be known.
    assert with_memory < 0.3 * chance
    memory = state.carried.memory
    assert memory.batch_size == ROWS and memory.slots == (16,)
    assert np.all(memory.groups[0][0].valid_BM)

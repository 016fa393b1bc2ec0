"""On the GPU, with the kernels that training and generation really use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import VARIANTS, call, make, run, run_on, some_tokens

from stellarbyte_jax.config import ByteConfig, DataConfig, MemoryConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.inference.api import generate
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.memory import Memory
from stellarbyte_jax.training.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.training.state import create_state
from stellarbyte_jax.training.step import make_train_step

pytestmark = pytest.mark.gpu

CONFIG = ByteConfig(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=256,
)


def packed(random, T=128):
    ids = np.zeros((2, T), np.int32)
    positions = np.zeros((2, T), np.int32)
    for row, cuts in enumerate([(40, 90, T), (64, 120)]):
        start = 0
        for number, end in enumerate(cuts, 1):
            ids[row, start:end], positions[row, start:end] = number, np.arange(end - start)
            start = end
    tokens = random.integers(0, CONFIG.vocab_size, (2, T), dtype=np.int32)
    return {"tokens": tokens, "segment_ids": ids, "positions": positions, "loss_mask": (ids > 0) & (positions > 0)}


def test_documents_of_a_row_do_not_feel_each_other():
    """Through the whole model with the fused kernel: not a bit changes."""
    model = ByteTransformer(dataclasses.replace(CONFIG, attention_implementation="cudnn"))
    params = init_params(model, jax.random.key(0))
    batch = packed(np.random.default_rng(0))

    def logits(tokens):
        where = {"positions_BT": batch["positions"], "segment_ids_BT": batch["segment_ids"]}
        return run(model, params, tokens, max_segments=4, **where)

    changed = batch["tokens"].copy()
    changed[0, 45:90] = (changed[0, 45:90] + 1) % CONFIG.vocab_size
    a, b = logits(batch["tokens"]), logits(changed)
    np.testing.assert_array_equal(a[0, :45], b[0, :45])
    np.testing.assert_array_equal(a[0, 90:], b[0, 90:])
    assert np.any(np.asarray(a[0, 45:90]) != np.asarray(b[0, 45:90]), axis=-1).all()


def test_a_step_with_the_fused_kernel_equals_one_with_the_reference():
    results = {}
    for implementation in ("cudnn", "reference"):
        config = TrainConfig(
            output_dir="unused",
            steps=10,
            global_batch_size=2,
            model=dataclasses.replace(CONFIG, attention_implementation=implementation),
            data=DataConfig(sequence_length=128, max_documents_per_sequence=3),
            schedule=ScheduleConfig(warmup_steps=0),
        )
        model = ByteTransformer(config.model)
        optimizer = make_optimizer(config, model)
        state = create_state(config, model, optimizer)
        step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config)))
        metrics = []
        for seed in range(3):
            state, m = step(state, packed(np.random.default_rng(seed)))
            metrics.append({name: float(value) for name, value in m.items()})
        results[implementation] = metrics
    for a, b in zip(results["cudnn"], results["reference"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=2e-2)


def test_generation_equals_the_full_pass():
    """In float32, where the largest logit does not depend on rounding."""
    model = ByteTransformer(dataclasses.replace(CONFIG, compute_dtype="float32"))
    params = jax.tree.map(lambda x: 3 * x, init_params(model, jax.random.key(0)))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    with jax.default_matmul_precision("highest"):
        made = generate(model, params, prompts, max_new_tokens=12).sequences
        for prompt, new in zip(prompts, made, strict=True):
            logits = run(model, params, jax.device_put(np.asarray([prompt + new], np.int32)))[0]
            np.testing.assert_array_equal(np.argmax(logits[len(prompt) - 1 : -1], axis=-1), new)


def test_generation_in_bfloat16_with_the_fused_prefill():
    model = ByteTransformer(CONFIG)
    params = init_params(model, jax.random.key(0))
    prompts = [[5, 6, 7], list(range(40))]
    result = generate(model, params, prompts, max_new_tokens=20, temperature=0.7, top_p=0.9, seed=3)
    again = generate(model, params, prompts, max_new_tokens=20, temperature=0.7, top_p=0.9, seed=3)
    np.testing.assert_array_equal(result.tokens, again.tokens)
    assert result.tokens.shape == (2, 20) and (result.tokens < CONFIG.vocab_size).all()


def test_memory_with_the_fused_kernel_equals_one_long_pass():
    """Rows of two documents each, over segment edges; bfloat16 against float32 by the reference."""
    T, n = 64, 4
    config = dataclasses.replace(CONFIG, memory=MemoryConfig(length=64), position_embedding="xpos")
    params = jax.tree.map(lambda x: 2 * x, init_params(ByteTransformer(config), jax.random.key(0)))
    random = np.random.default_rng(0)
    tokens = random.integers(0, CONFIG.vocab_size, (2, n * T), dtype=np.int32)
    starts = (100, 128)
    ids = np.stack([1 + (np.arange(n * T) >= start).astype(np.int32) for start in starts])
    positions = np.stack([np.r_[np.arange(s), np.arange(n * T - s)] for s in starts]).astype(np.int32)

    exact = ByteTransformer(dataclasses.replace(config, compute_dtype="float32", attention_implementation="reference"))
    with jax.default_matmul_precision("highest"):
        expected = run(exact, params, tokens, segment_ids_BT=ids)
    fused = ByteTransformer(dataclasses.replace(config, attention_implementation="cudnn"))
    memory, found = Memory.create(config, 2), []
    for at in range(0, n * T, T):
        cut = slice(at, at + T)
        where = {"positions_BT": positions[:, cut], "segment_ids_BT": ids[:, cut]}
        logits, state = run_on(fused, params, tokens[:, cut], memory=memory, max_segments=2, **where)
        memory = state.memory
        found.append(logits)
    error = jnp.linalg.norm(jnp.concatenate(found, axis=1) - expected) / jnp.linalg.norm(expected)
    assert error < 3e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_in_bfloat16_is_close_to_float32(variant):
    """With the kernels that "auto" takes, logits and gradients; cached decoding too."""
    model, params = make(variant, compute_dtype="bfloat16", head_dim=32)
    exact = ByteTransformer(dataclasses.replace(model.config, compute_dtype="float32"))
    tokens = some_tokens(2, 32)

    def loss(params, model):
        logits = call(model, params, Inputs(tokens))[0]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen), logits

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    slopes, logits = step(params, model)
    with jax.default_matmul_precision("highest"):
        exact_slopes, exact_logits = step(params, exact)

    def error(a, b):
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    assert error(logits, exact_logits) < 3e-2
    flat, exact_flat = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(s)]) for s in (slopes, exact_slopes))
    assert error(flat, exact_flat) < 8e-2
    decoded = []
    for network in (model, exact):
        with jax.default_matmul_precision("highest"):
            parts, state = run_on(network, params, tokens[:, :16], cache=make_cache(network.config, 2, 32))
            for at in range(16, 20):
                one, state = run_on(network, params, tokens[:, at : at + 1], cache=state.cache)
                parts = jnp.concatenate([parts, one], axis=1)
        decoded.append(parts)
    np.testing.assert_allclose(decoded[0][:, :16], logits[:, :16], atol=0.1)
    # Of single tokens not with the whole pass: a gate by context sees other tokens there.
    assert error(*(d[:, :16] for d in decoded)) < 3e-2
    assert error(*(d[:, 16:] for d in decoded)) < 3e-2

"""Numbers about a run: validation means, floating-point operations, utilisation, memory."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers.training import MODEL

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.training import metrics
from stellarbyte_jax.training.loss import batch_loss
from stellarbyte_jax.training.metrics import (
    count_parameters,
    flops_per_token,
    memory_metrics,
    peak_flops,
    speed_metrics,
    validation_metrics,
)


def test_validation_means():
    sums = {"cross_entropy": 12.0, "correct": 2.0, "tokens": 8.0, "bytes": 24.0}
    found = validation_metrics(sums)
    assert found["loss"] == 1.5
    assert found["perplexity"] == pytest.approx(math.e**1.5)
    assert found["accuracy"] == 0.25
    assert found["bits_per_byte"] == pytest.approx(12 / math.log(2) / 24)
    assert "bits_per_byte" not in validation_metrics({**sums, "bytes": 0.0})
    assert math.isfinite(validation_metrics({**sums, "cross_entropy": 1e6})["perplexity"])
    with pytest.raises(ValueError, match="no token to predict"):
        validation_metrics({**sums, "tokens": 0.0})


def test_flops_equal_what_xla_counts():
    """Forward and backward of the compiled step, full attention; XLA adds the elementwise work."""
    model = ByteTransformer(dataclasses.replace(MODEL, hidden_size=128, intermediate_size=512, vocab_size=512))
    params = init_params(model, jax.random.key(0))
    batch = {"tokens": jnp.zeros((2, 32), jnp.int32)}
    slope = jax.jit(jax.grad(lambda p: batch_loss(model, p, batch, LossConfig())[0]))
    cost = slope.lower(params).compile().cost_analysis()
    if cost is None or "flops" not in cost:
        pytest.skip("this jax reports no cost")
    ours = flops_per_token(model.config, count_parameters(params), 32).full * 64
    # Loops are counted once: scale the body of the scan over depth by its two layers.
    assert 0.4 * ours < cost["flops"] < 1.2 * ours


def test_weights_are_counted_without_the_look_up():
    """An untied embedding multiplies nothing; a tied one is the head. Six operations for each weight and token."""
    attention = flops_per_token(MODEL, 0, 16).full + 6 * 67 * 32
    assert flops_per_token(MODEL, 10**6, 16).full - attention == 6 * (10**6 - 67 * 32)
    tied = dataclasses.replace(MODEL, tie_word_embeddings=True)
    assert flops_per_token(tied, 10**6, 16).full - attention == 6 * 10**6
    padded = dataclasses.replace(MODEL, vocab_size_multiple=64)  # the head is computed for the padding too
    assert flops_per_token(padded, 10**6, 16).full - attention == 6 * (10**6 - 128 * 32)


def test_attention_is_counted_by_the_keys_that_tokens_see():
    """Causal: half a row on average; a window that is short for the row: the window; a memory: all of it."""
    L, width, row = MODEL.num_hidden_layers, MODEL.num_attention_heads * MODEL.head_size, 64
    weights = 6 * (10**6 - 67 * 32)

    def of_attention(**settings):
        found = flops_per_token(dataclasses.replace(MODEL, **settings), 10**6, row)
        assert found.full - weights == 2 * (found.causal - weights)
        return found.causal - weights

    assert of_attention() == 12 * L * width * row / 2
    assert of_attention(sliding_window=4) == 12 * L * width * 4
    assert of_attention(sliding_window=1000) == of_attention()
    assert of_attention(memory={"length": 100}) == 12 * L * width * 100
    assert of_attention(memory={"length": 100, "recent_share": 0.5}) == 12 * L * width * 100
    assert of_attention(memory={"length": (0, 100)}) == 12 * width * (row / 2 + 100)


def test_utilisation_by_both_conventions(monkeypatch):
    flops = flops_per_token(MODEL, 10**6, 16)
    assert "mfu" not in speed_metrics(1000, 2.0, flops)  # the peak of a CPU is not known
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e10)
    found = speed_metrics(1000, 2.0, flops)
    matrices = 6 * (10**6 - 67 * 32)
    attention = 6 * 2 * 16 * 32
    assert found["tokens_per_second"] == 500
    assert found["mfu"] == pytest.approx(500 * (matrices + attention) / 1e10)
    assert found["mfu_full_attention"] == pytest.approx(500 * (matrices + 2 * attention) / 1e10)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert peak_flops() == peak


def test_peak_memory_where_the_device_reports_it(monkeypatch):
    for stats, expected in (({"peak_bytes_in_use": 3 * 2**29}, {"peak_memory_gib": 1.5}), ({}, {}), (None, {})):
        device = SimpleNamespace(memory_stats=lambda stats=stats: stats)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert memory_metrics() == expected

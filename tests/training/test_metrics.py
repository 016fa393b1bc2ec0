"""Numbers about a run: validation means, utilisation, memory."""

import math
from types import SimpleNamespace

import jax
import pytest
from helpers.training import MODEL

from stellarbyte_jax.inspect.costs import flops_per_token
from stellarbyte_jax.training import metrics
from stellarbyte_jax.training.metrics import (
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
    of_four = speed_metrics(1000, 2.0, flops, 4)
    assert of_four == {name: x if name == "tokens_per_second" else pytest.approx(x / 4) for name, x in found.items()}


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
        least = {"peak_bytes_in_use": 2**29} if expected else None
        smaller = SimpleNamespace(memory_stats=lambda least=least: least)
        monkeypatch.setattr(jax, "local_devices", lambda device=device, smaller=smaller: [smaller, device])
        assert memory_metrics() == expected

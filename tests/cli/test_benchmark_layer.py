"""``benchmark moe_layer``: figures of a layer with experts, ours and the peer's."""

import json

import pytest

from stellarbyte_jax.cli import benchmark, layer_speed
from stellarbyte_jax.cli.layer_peers import _peer
from stellarbyte_jax.cli.layer_speed import SHAPES, Layer, figures
from stellarbyte_jax.config import load


def test_figures_of_a_layer():
    """Medians; the backward pass is the difference, with twice the operations."""
    shape = Layer(1000, 100, 50, 8, 2)
    assert shape.flops == 2 * 3 * (2 * 1000) * 100 * 50
    found = figures(shape, [1e-6, 3e-6, 2e-6], [8e-6, 5e-6, 6e-6], "NVIDIA H100 80GB HBM3")
    assert (found["forward_ms"], found["backward_ms"], found["both_ms"]) == (0.002, 0.004, 0.006)
    assert (found["forward_tflops"], found["backward_tflops"], found["both_tflops"]) == (30.0, 30.0, 30.0)
    assert (found["lowest_both_ms"], found["highest_both_ms"]) == (0.005, 0.008)
    assert found["of_peak"] == pytest.approx(30 / 989, abs=1e-3)
    assert "of_peak" not in figures(shape, [1e-6], [2e-6], "cpu")


def test_shapes_have_the_same_operations():
    assert len({shape.flops for name, shape in SHAPES.items() if name != "small"}) == 1


def test_a_layer_is_measured_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer_speed, "REPEATS", 1)
    output = tmp_path / "layer.json"
    assert benchmark.main(["moe_layer", "--steps", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["flops"] == "6 tokens choices D n forward, 12 backward"
    assert list(found["results"]) == ["small"]
    assert found["results"]["small"]["both_ms"] > 0
    # Of a token in float32: itself and its router's numbers, and of two choices a row and what is inside an expert.
    assert found["results"]["small"]["kept_bytes_of_a_token"] > 4 * (64 + 2 * 2 * 64)
    assert "small" in capsys.readouterr().out


def test_the_peer_is_measured_in_the_same_shape():
    pytest.importorskip("torch")
    found = _peer("small")(load("quickstart_moe", []), 1)
    assert found["experts"] == "eager"
    assert found["both_ms"] > found["forward_ms"] > 0

"""``benchmark moe_layer``: figures of a layer with experts, ours and the peer's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from stellarbyte_jax.cli import benchmark, layer_ours, layer_speed
from stellarbyte_jax.cli.layer_ours import kept_of_tokens
from stellarbyte_jax.cli.layer_peers import _peer
from stellarbyte_jax.cli.layer_speed import SHAPES, Layer, figures
from stellarbyte_jax.config import MoEConfig, load


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


def test_a_layer_has_the_shape_and_the_implementation_of_the_config(monkeypatch):
    given = []
    monkeypatch.setattr(layer_ours, "measure_layer", lambda *told: given.append(told) or {})
    config = load("quickstart_moe", ["model.moe.implementation=xla"])
    layer_speed.WORKERS["n512"](config, 3)
    ((model, shape, calls),) = given
    assert (shape, calls) == (SHAPES["n512"], 3)
    assert (model.hidden_size, model.moe.num_experts, model.moe.num_experts_per_tok) == (1536, 64, 4)
    assert (model.expert_size, model.moe.implementation) == (512, "xla")


def test_both_passes_are_measured_with_weights_of_experts_in_the_compute_dtype(monkeypatch):
    programs = []

    def repeated(run, *arrays):
        programs.append(jax.eval_shape(run, *arrays))
        return float(len(programs))

    monkeypatch.setattr(layer_ours, "_repeated", repeated)
    monkeypatch.setattr(layer_ours, "timed", lambda seconds, calls: [seconds])
    shape = Layer(256, 64, 32, 4, 2)
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=32)
    config = dataclasses.replace(load("quickstart", []).model, hidden_size=64, moe=moe, compute_dtype="bfloat16")
    found = layer_ours.measure_layer(config, shape, 1)
    assert (found["forward_ms"], found["both_ms"]) == (1000, 2000)
    (ahead, kept), (both, (weights, tokens)) = programs
    assert ahead == both == tokens and (tokens.shape, tokens.dtype) == ((1, 256, 64), jnp.bfloat16) and kept
    assert {w.dtype for w in jax.tree.leaves(weights["experts"])} == {jnp.dtype(jnp.bfloat16)}
    assert weights["router"]["kernel"].dtype == jnp.float32


def test_a_call_is_a_share_of_the_time_of_all(monkeypatch):
    ran = []
    monkeypatch.setattr(layer_speed.time, "perf_counter", lambda: 2.0 * len(ran))
    found = layer_speed.timed(layer_ours._repeated(lambda x: ran.append(x), 7), 3)
    assert found == [2.0] * 5
    assert ran == [7] * (1 + 3 * 5), "once before, to compile"


def test_weights_and_tokens_in_other_shapes_are_not_what_is_kept_of_tokens():
    T, D, F = 24, 8, 3
    params, x = {"w": jnp.ones((F, D)), "by": jnp.ones(F)}, jnp.ones((1, T, D))

    def forward(params, x):
        return jax.vjp(lambda p, x: jnp.sin(x.reshape(-1, D) @ p["w"].T.reshape(D, F)) * p["by"][None], params, x)

    found = kept_of_tokens(forward, params, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(forward, params, x)[1])]
    assert {(T, D), (D, F)} < set(shapes)
    assert [(shapes[number], size) for number, size in found.items()] == [((T, F), 4 * T * F)] * 2  # sine and cosine


def test_the_peer_is_measured_in_the_same_shape():
    pytest.importorskip("torch")
    found = _peer("small")(load("quickstart_moe", []), 1)
    assert found["experts"] == "eager"
    assert found["both_ms"] > found["forward_ms"] > 0


@pytest.mark.parametrize("setting", ["model.hidden_size=64", "model.moe.num_experts=8", "model.num_hidden_layers=2"])
def test_settings_of_the_shapes_are_refused(setting, capsys):
    assert benchmark.main(["moe_layer", "--set", setting]) == 2
    assert f"--set {setting}: benchmark moe_layer has shapes of its own, leave it out" in capsys.readouterr().err

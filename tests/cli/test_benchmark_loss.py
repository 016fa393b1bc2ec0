"""``benchmark cross_entropy``: what is counted, and that sizes of chunks are compared with each other."""

import json

import jax.numpy as jnp
import pytest

from stellarbyte_jax.cli import benchmark, loss_ours, loss_speed
from stellarbyte_jax.cli.loss_speed import CASES, Case, figures


def test_figures_are_operations_over_seconds():
    case = Case(1000, 100, 10000)
    found = figures(case, [2e-3, 1e-3, 4e-3], 3 * 2**29, "NVIDIA H100 80GB HBM3")
    assert found["tflops"] == pytest.approx(6 * 1000 * 100 * 10000 / 2e-3 / 1e12)
    assert (found["ms"], found["lowest_ms"], found["highest_ms"], found["repeats"]) == (2.0, 1.0, 4.0, 3)
    assert found["extra_gib"] == 1.5 and found["of_peak"] == pytest.approx(found["tflops"] / 989, abs=1e-4)
    assert "of_peak" not in figures(case, [1e-3], 0, "cpu")


def test_chunks_are_measured_without_a_gpu(tmp_path, capsys):
    output = tmp_path / "loss.json"
    assert benchmark.main(["cross_entropy", "--steps", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["config"]["file"] is None and found["flops"] == "6 tokens D V"
    (result,) = found["results"].values()
    assert set(result) == {"xla_chunks_of_128", "pallas_chunks_of_128", "on"}
    assert result["xla_chunks_of_128"]["tflops"] > 0 and "Hopper" in result["pallas_chunks_of_128"]["refused"]
    assert "say nothing of speed" in capsys.readouterr().out


def test_memory_grows_with_chunks_and_wrong_gradients_are_an_error(monkeypatch):
    case = Case(256, 64, 1024)
    found = loss_ours.measure_case(case, [32, 256], 1)
    small, large = (found[f"xla_chunks_of_{chunk}"]["extra_gib"] * 2**30 for chunk in (32, 256))
    assert 256 * 1024 * 4 * 0.9 < large and small < large and "error" not in found
    right = loss_ours.linear_cross_entropy

    def wrong(x, kernel, targets, *, chunk_size, **more):
        loss, sums = right(x, kernel, targets, chunk_size=chunk_size, **more)
        return loss * (1.1 if chunk_size == 32 else 1), sums

    monkeypatch.setattr(loss_ours, "linear_cross_entropy", wrong)
    assert "apart" in loss_ours.measure_case(case, [256, 32], 1)["error"]


def test_a_peer_on_the_cpu_computes_the_mean_loss():
    torch = pytest.importorskip("torch", reason="the peer is torch's loss")
    assert loss_speed.LOSS_PEERS["torch_loss_16k_32k"](None, None)["error"].endswith("needs a GPU")
    assert float(loss_speed.first_of((torch.tensor(2.0), None))) == float(loss_speed.first_of(jnp.float32(2.0))) == 2.0


def test_settings_of_other_measurements_are_refused(capsys):
    assert benchmark.main(["cross_entropy", "--set", "model.hidden_size=8"]) == 2
    assert "benchmark cross_entropy has shapes and calls of its own, leave it out" in capsys.readouterr().err


def test_no_chunk_has_more_tokens_than_there_are(monkeypatch):
    given = []
    monkeypatch.setattr(loss_ours, "measure_case", lambda *told: given.append(told) or {})
    loss_speed.WORKERS["small_loss"](None, 7)
    loss_speed.WORKERS["loss_32k_128k"](None, None)
    assert given == [
        (CASES["small_loss"], [128] * 3, 7),
        (CASES["loss_32k_128k"], list(loss_speed.CHUNKS), loss_speed.CALLS),
    ]

"""``benchmark attention``: what is counted, what is compared, and that both sides see the same."""

import json

import jax
import numpy as np
import pytest

from stellarbyte_jax.cli import attention_ours, attention_speed, benchmark
from stellarbyte_jax.cli.attention_ours import mask_of, measure_case
from stellarbyte_jax.cli.attention_peers import seen_by
from stellarbyte_jax.cli.attention_speed import CASES, NAMES, Case, documents, figures, firsts, pairs

CHANGES = {
    "causal": {},
    "packed": {"document": 9},
    "window": {"window": 7},
    "window longer than documents": {"document": 5, "window": 30},
    "sinks": {"window": 7, "sinks": 3},
    "packed, sinks": {"document": 20, "window": 5, "sinks": 2},
}


def small(name):
    return Case(**{"rows": 2, "length": 64, "heads": 2, "kv_heads": 1, "size": 8, **CHANGES[name]})


@pytest.mark.parametrize("name", CHANGES)
def test_pairs_are_those_that_are_seen(name):
    mask = np.broadcast_to(np.asarray(mask_of(small(name)).allowed())[:, 0], (2, 64, 64))
    assert pairs(small(name)) == mask.sum()


@pytest.mark.parametrize("name", CHANGES)
def test_the_peer_sees_what_we_see(name):
    torch = pytest.importorskip("torch")
    sees = seen_by(torch, small(name), "cpu")
    b, t, s = torch.meshgrid(torch.arange(2), torch.arange(64), torch.arange(64), indexing="ij")
    ours = np.broadcast_to(np.asarray(mask_of(small(name)).allowed())[:, 0], (2, 64, 64))
    np.testing.assert_array_equal(sees(b, None, t, s).numpy(), ours)


def test_documents_are_neighbours_of_about_the_length_that_is_asked_for():
    ids = documents(CASES["packed_128"])
    assert ids.shape == (4, 8192) and np.all(np.diff(ids, axis=1) >= 0) and np.all(np.diff(ids, axis=1) <= 1)
    assert 8192 / 1024 / 2 < (ids.max(axis=1) + 1).mean() < 2 * 8192 / 1024
    np.testing.assert_array_equal(ids, documents(CASES["packed_128"]))
    first = firsts(ids)
    assert np.all(np.take_along_axis(ids, first, 1) == ids)
    assert np.all((first == 0) | (np.take_along_axis(ids, np.maximum(first - 1, 0), 1) < ids))


def test_figures_of_a_case():
    case = Case(1, 1000, 10, 5, 100)
    flops = 4 * 10 * 100 * 1000 * 1001 / 2
    found = figures(case, [1e-3, 3e-3, 2e-3], [8e-3, 5e-3, 6e-3], "NVIDIA H100 80GB HBM3")
    assert (found["forward_ms"], found["backward_ms"]) == (2.0, 4.0)
    assert found["forward_tflops"] == pytest.approx(flops / 2e-3 / 1e12, rel=1e-3)
    assert found["backward_tflops"] == pytest.approx(2.5 * flops / 4e-3 / 1e12, rel=1e-3)
    assert found["both_tflops"] == pytest.approx(3.5 * flops / 6e-3 / 1e12, rel=1e-3)
    assert (found["lowest_both_ms"], found["highest_both_ms"], found["repeats"]) == (5.0, 8.0, 3)
    assert found["of_peak"] == pytest.approx(found["both_tflops"] / 989, abs=1e-4)
    assert "of_peak" not in figures(case, [1e-3], [2e-3], "cpu")


def test_no_other_measurement_has_the_name_of_one():
    known = [*benchmark.ATTENTION, *benchmark.ATTENTION_PEERS, *benchmark.LAYERS, *benchmark.LAYER_PEERS]
    known += [*benchmark.GENERATION, *benchmark.EVALUATION, *benchmark.EXPERTS, *benchmark.LORA, *benchmark.OTHERS]
    assert len(known) == len(set(known))


def test_each_kind_of_mask_is_measured():
    cases = [CASES[name] for name in NAMES]
    assert {case.size for case in cases} == {64, 128}
    for field in ("document", "window", "sinks", "softcap"):
        assert any(getattr(case, field) for case in cases)


def test_ways_are_measured_without_a_gpu_and_refusals_are_told(tmp_path, capsys):
    output = tmp_path / "attention.json"
    assert benchmark.main(["attention", "--steps", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["config"]["file"] is None and found["flops"].startswith("4 H a head and pair")
    (result,) = found["results"].values()
    assert "Hopper" in result["pallas"]["refused"] and "a window does not hide" in result["cudnn"]["refused"]
    assert result["xla"]["both_tflops"] > 0 and result["reference"]["both_tflops"] > 0
    assert result["apart"] < 0.02
    assert "small_attention" in capsys.readouterr().out


def test_a_wrong_way_is_an_error(monkeypatch):
    right = attention_ours.attention

    def wrong(q, k, v, mask, **options):
        found = right(q, k, v, mask, **options)
        return found._replace(out_BTNH=found.out_BTNH * 1.1) if options["implementation"] == "xla" else found

    monkeypatch.setattr(attention_ours, "attention", wrong)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes bfloat16 and float32 inside
        found = measure_case(small("causal"), ("xla", "reference"), 1)
    assert "two implementations are" in found["error"] and found["apart"] > 0.05


def test_settings_of_other_measurements_are_refused(capsys):
    for given in (["--config", "quickstart"], ["--set", "model.hidden_size=8"]):
        assert benchmark.main(["attention", *given]) == 2
        assert "benchmark attention has shapes and calls of its own, leave it out" in capsys.readouterr().err


def test_the_calls_of_a_repeat(monkeypatch):
    given = []
    monkeypatch.setattr(attention_ours, "measure_case", lambda *told: given.append(told) or {})
    attention_speed.WORKERS["causal_64"](None, None)
    attention_speed.WORKERS["causal_64"](None, 7)
    assert given == [(CASES["causal_64"], attention_speed.WAYS, calls) for calls in (attention_speed.CALLS, 7)]

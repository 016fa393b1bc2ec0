"""``benchmark decode_attention``: what is counted, what is compared."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.cli import benchmark, decode_ours, decode_speed
from stellarbyte_jax.cli.decode_ours import measure_case
from stellarbyte_jax.cli.decode_speed import CASES, NAMES, SMALL, Case, figures


def test_bytes_are_those_of_the_storage():
    for case in [Case(2, 128, dtype, 8, 2) for dtype in ("bfloat16", "int8", "float8_e4m3fn")]:
        _, storage = jax.eval_shape(lambda case=case: decode_ours._arrays(case))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(storage))
        assert held == case.bytes * case.layers >= case.least


def test_figures_of_a_case():
    case = Case(1, 1000, "int8", 4, 2, 96)
    assert case.bytes == 2 * 1000 * 2 * 100
    found = figures(case, [1e-6, 4e-6, 2e-6], 1e12)
    assert (found["microseconds"], found["lowest"], found["highest"], found["repeats"]) == (2.0, 1.0, 4.0, 3)
    assert (found["gigabytes_per_second"], found["of_bandwidth"]) == (200.0, 0.2)
    assert "of_bandwidth" not in figures(case, [1e-6], None)


def test_what_is_measured():
    cases = [case for name in NAMES for case in CASES[name].values()]
    assert {case.rows for case in cases} == {1, 32} and {2048, 16384} <= {case.keys for case in cases}
    assert {case.dtype for case in cases} == {"bfloat16", "int8", "float8_e4m3fn"}
    assert all(case.bytes * case.layers >= decode_speed.LEAST for case in cases)


def test_both_ways_are_measured_without_a_gpu_or_say_why_not(tmp_path, capsys):
    output = tmp_path / "decode.json"
    assert benchmark.main(["decode_attention", "--steps", "1", "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"].values()
    for name in SMALL["small_decode"]:
        assert "Hopper" in result[name]["pallas"]["refused"]
        assert result[name]["auto"]["gigabytes_per_second"] > 0
    assert "small_decode" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [False, True])
def test_ways_are_compared(monkeypatch, wrong):
    right = decode_ours.attention

    def changed(q, k, v, mask, **options):
        found = right(q, k, v, mask, **options)
        return found._replace(out_BTNH=found.out_BTNH * 1.1) if wrong and options["implementation"] == "xla" else found

    monkeypatch.setattr(decode_ours, "attention", changed)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes bfloat16 and float32 inside
        found = measure_case(SMALL["small_decode"]["int8"], ("xla", "reference"), 1)
    assert ("error" in found) == wrong and (found["apart"] > 0.05) == wrong


def test_each_layer_is_read():
    """Of layers that differ the sum is told."""
    case = SMALL["small_decode"]["bfloat16"]
    q, storage = decode_ours._arrays(case)
    one = decode_ours._attended(case, "reference", q, storage)
    storage = storage.replace(values=storage.values.at[1].set(0))
    np.testing.assert_allclose(decode_ours._attended(case, "reference", q, storage), one / 2, atol=1e-3)
    assert one.dtype == jnp.float32


def test_settings_of_other_measurements_are_refused(capsys):
    assert benchmark.main(["decode_attention", "--config", "quickstart"]) == 2
    assert "benchmark decode_attention has shapes and calls of its own, leave it out" in capsys.readouterr().err


def test_the_calls_of_a_repeat(monkeypatch):
    given = []
    monkeypatch.setattr(decode_ours, "measure_case", lambda *told: given.append(told) or {"apart": 0.0})
    decode_speed.WORKERS["small_decode"](None, None)
    decode_speed.WORKERS["small_decode"](None, 7)
    small = list(SMALL["small_decode"].values())
    ways = decode_speed.WAYS
    assert given == [(case, ways, calls) for calls in (decode_speed.CALLS, 7) for case in small]


def test_an_error_of_a_case_is_one_of_the_measurement(monkeypatch):
    monkeypatch.setattr(decode_ours, "measure_case", lambda *told: {"error": "apart"})
    assert decode_speed.WORKERS["small_decode"](None, None)["error"] == "apart"

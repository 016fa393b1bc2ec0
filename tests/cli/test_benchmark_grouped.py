"""The command benchmark grouped_matmul: what is measured, that its loops compute, and that a wrong product is seen."""

import json
import re
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.cli import benchmark, grouped_ours, grouped_peers, grouped_speed, measurements
from stellarbyte_jax.cli.grouped_speed import PRODUCTS, Shape, loads
from stellarbyte_jax.cli.grouped_table import table
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas import grouped_matmul as kernels
from stellarbyte_jax.ops.pallas.grouped_rows import Tuning

H100 = {"platform": "gpu", "devices": 1, "kind": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
A100 = {**H100, "kind": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0"}
RATES = {"pallas": 600.0, "xla": 240.0, "torch": 480.0}
TINY = Shape(64, 128, 8, (64, 2048))


def _played(names, ways, **more):
    """What a worker would give for all of these shapes."""
    figures = {way: {"tflops": RATES[way], "of_peak": 0.5, "worst_error": 0.001, **more} for way in ways}

    def of_rows(rows):
        return {product: dict.fromkeys(grouped_speed.LOADS, figures) for product in grouped_speed.products(rows)}

    made = {name: {str(rows): of_rows(rows) for rows in grouped_speed.SHAPES[name].rows} for name in names}
    return {"shapes": made, "on": "made up"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose measurements are made up; returns which workers ran, with which shapes."""
    monkeypatch.chdir(tmp_path)
    made = []

    def make(device=H100, torch=True, **found):
        def run(name, options):
            if name == "device":
                return device
            made.append((name, options.only))
            ways = ("torch",) if name == "grouped_torch" else ("pallas", "xla")
            return found.get(name, _played(options.only, ways))

        monkeypatch.setattr(benchmark, "_run_worker", run)
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: object() if torch else None)
        return made

    return make


def report(file="benchmarks/grouped_matmul.json"):
    return json.loads(Path(file).read_text())


def test_all_shapes_are_measured_in_one_process_of_ours_and_one_of_the_peer(machine, capsys):
    made, names = machine(), list(grouped_speed.ON_GPU)
    assert benchmark.main(["grouped_matmul"]) == 0
    assert made == [("grouped_ours", names), ("grouped_torch", names)]
    rows = report()["results"]["2048x768x128"]["rows"]
    assert list(rows) == ["64", "256", "1024", "4096", "16384", "131072"]
    assert list(rows["64"]) == ["forward"] and list(rows["16384"]) == ["forward", "dx", "dw"]
    assert rows["16384"]["dw"]["half"]["times_torch"] == 1.25 and rows["64"]["forward"]["even"]["times_xla"] == 2.5
    told = capsys.readouterr().out
    line = (
        "| 2,048 → 768, 128 | 16,384 | dw | 600 / 600 / 600 | 50% / 50% / 50% | 480 / 480 / 480 | 1.25 / 1.25 / 1.25 |"
    )
    assert f"{line} 240 / 240 / 240 | 2.50 / 2.50 / 2.50 | - | 1.0e-03 |" in told
    assert told.count("| forward |") == 20 and told.count("| dw |") == 12


def test_one_shape_is_measured_and_the_peer_left_out(machine, capsys):
    made = machine()
    typed = "grouped_matmul --only 512x1024x64 --output out.json"
    assert benchmark.main([*typed.split(), "--no-peer"]) == 0
    assert made == [("grouped_ours", ["512x1024x64"])] and list(report("out.json")["results"]) == ["512x1024x64"]
    assert "| 600 / 600 / 600 | 50% / 50% / 50% | - | - |" in capsys.readouterr().out
    machine(torch=False)
    assert benchmark.main(typed.split()) == 0 and "no peer: torch is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "failure", [{"error": "exit code 1"}, _played(["512x1024x64"], ["torch"], error="the result is wrong")]
)
def test_a_product_that_failed_replaces_no_figures(failure, machine, capsys):
    machine(grouped_torch=failure)
    assert benchmark.main("grouped_matmul --only 512x1024x64 --output out.json".split()) == 1
    assert not Path("out.json").exists() and "a measurement failed" in capsys.readouterr().err
    assert report("out.json.part")["results"]["512x1024x64"]["rows"]["16384"]["dx"]["even"]["pallas"]["tflops"] == 600


def test_another_gpu_than_a_hopper_is_refused(machine, capsys):
    made = machine(A100)
    assert benchmark.main(["grouped_matmul"]) == 1 and not made
    assert "needs an NVIDIA Hopper GPU" in (told := capsys.readouterr().err) and "A100" in told


def test_without_a_gpu_a_tiny_shape_is_measured_without_peer(machine, capsys):
    made = machine({"platform": "cpu", "devices": 1})
    assert benchmark.main(["grouped_matmul"]) == 0
    assert made == [("grouped_ours", list(grouped_speed.SMALL))]
    assert "say nothing of speed" in capsys.readouterr().out and report("benchmarks/grouped_matmul-cpu.json")
    assert benchmark.main("grouped_matmul --only 2048x1408x64".split()) == 1
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["--config quickstart", "--set steps=1", "--steps 3"])
def test_settings_that_it_has_not_are_refused(typed, machine, capsys):
    made = machine()
    assert benchmark.main(["grouped_matmul", *typed.split()]) == 2 and not made
    assert f"{typed.split()[0]}: benchmark grouped_matmul has shapes and calls of its own" in capsys.readouterr().err


def test_a_worker_gets_the_shapes(monkeypatch, capsys):
    typed = []
    monkeypatch.setattr(benchmark, "run_worker", lambda words, **_: typed.append(words) or {})
    options = benchmark._parse("grouped_matmul --only 512x1024x64 --only 1024x1024x64".split())
    benchmark._run_worker("grouped_ours", options)
    monkeypatch.setitem(benchmark.WORKERS, "grouped_ours", lambda config, steps, names: {"names": names})
    assert benchmark.main(typed[0]) == 0
    assert capsys.readouterr().out == 'RESULT {"names": ["512x1024x64", "1024x1024x64"]}\n'


def test_the_device_tells_which_gpu_it_is(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", device_kind=H100["kind"], compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert measurements.WORKERS["device"](None, 0) == H100


def test_loads_are_even_half_and_empty_ones():
    found = loads(64, 16384)
    assert all(int(sizes.sum()) == 16384 for sizes in found.values())
    assert found["even"].max() < 400 and found["half"].max() == 8192 and (found["third"] == 0).sum() == 21


def test_figures_are_operations_over_seconds():
    shape, flops = Shape(100, 10, 4, (5,)), 2 * 5 * 100 * 10
    figures = grouped_speed.figures(shape, 5, [flops / 2e12, flops / 4e12, flops / 1e14], 0.001, H100["kind"])
    assert figures == {
        "tflops": 4.0,
        "lowest": 2.0,
        "highest": 100.0,
        "repeats": 3,
        "of_peak": 0.004,
        "worst_error": 0.001,
    }
    of = lambda seconds, error: grouped_speed.figures(shape, 5, [seconds], error, H100["kind"])["error"]  # noqa: E731
    assert "wrong" in of(1.0, 0.3) and "not finite" in of(1.0, float("nan")) and "faster" in of(flops / 1e16, 0.0)


def drawn(rows, load, way="xla"):
    owner = np.repeat(np.arange(TINY.experts, dtype=np.int32), loads(TINY.experts, rows)[load])
    return grouped_ours.drawn(jax.device_put(owner), TINY, way, grouped_speed.choices(load, rows))


@pytest.mark.parametrize(("rows", "load"), [(64, "half"), (2048, "third")])
@pytest.mark.parametrize("product", PRODUCTS)
def test_loops_compute_the_product_in_every_turn_and_errors_are_seen(rows, load, product):
    """Blocks of one for each expert, and several with matrices gathered."""
    arrays = drawn(rows, load)
    assert (arrays.groups.experts_G is None) == (rows == 64)
    program = jax.jit(grouped_ours.looped(product, "xla", 5)).lower(arrays).compile()
    out = program(arrays)
    assert float(grouped_ours.worst_error(product, arrays, out)) < 0.01
    wrong = out.at[(slice(0, 1),) * (out.ndim - 1)].multiply(-1)
    assert float(grouped_ours.worst_error(product, arrays, wrong)) > 0.02
    assert not np.isfinite(grouped_ours.worst_error(product, arrays, out.at[(0,) * out.ndim].set(jnp.nan)))
    alone = grouped_ours.product_of(product, "xla")
    needed = alone.lower(arrays.x, arrays.w, arrays.dy, arrays.groups).compile().as_text()
    text = program.as_text()
    body = text[text.index("\n%" + re.search(r"body=%([\w.-]+)", text)[1] + " ") :]
    within = dots(body[: body.index("\n}")])
    assert within == dots(needed[needed.index("\nENTRY") :]) > 0, "each in the loop's body, none before it"


def dots(text):
    """Products in a computation; in some releases of jax they are calls of a library."""
    return len(re.findall(r"^ +(?:ROOT )?%(?:ynn_fusion|dot|\S+ = .*__onednn\$matmul)", text, re.MULTILINE))


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_loop_of_kernels_can_be_lowered_for_a_gpu(product, monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)
    arrays = jax.eval_shape(lambda: drawn(64, "even", "pallas"))
    text = (
        jax.jit(grouped_ours.looped(product, "pallas", 3)).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert text.count("custom_call @mosaic_gpu") == 1 and text.count("stablehlo.while") == 1


def test_ours_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(grouped_ours, "LOADS", ("even",))
    monkeypatch.setattr(kernels, "tuning", lambda columns: Tuning(64, 2))
    monkeypatch.setitem(grouped_speed.SHAPES, "tiny", Shape(64, 64, 2, (64,)))
    found = grouped_ours.measure_ours(["tiny"])
    figures = found["shapes"]["tiny"]["64"]["forward"]["even"]
    assert figures.keys() == {"pallas", "xla"} and "left_out" not in found
    for ours in figures.values():
        assert "error" not in ours and ours["worst_error"] < 0.01 and ours["tflops"] > 0 and "compile_seconds" in ours


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch
def test_the_peer_computes_the_same(monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="the peer is torch's grouped product")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(grouped_peers, "calls", lambda shape, rows: 1)
    monkeypatch.setitem(grouped_speed.SHAPES, "tiny", Shape(64, 128, 4, (128,)))
    found = grouped_peers.WORKERS["grouped_torch"](None, 0, ["tiny"])["shapes"]["tiny"]["128"]
    assert list(found) == list(PRODUCTS)
    for of_loads in found.values():
        assert all("error" not in ways["torch"] for ways in of_loads.values()), of_loads
    assert "worst_error" not in found["dx"]["even"]["dense"]
    assert [product for product, loads in found.items() if loads["even"].get("dense", {}).get("tflops", 0) > 0] == [
        "forward",
        "dx",
    ]
    x, w, dy = torch.randn(6, 64), torch.randn(2, 64, 8), torch.randn(6, 8)
    owner, wrong = torch.tensor([0, 0, 1, 1, 1, 1]), {"forward": x[:, :8], "dx": x, "dw": w}
    for product, out in wrong.items():
        assert grouped_peers.worst_error(product, x, w, dy, owner, out) > 0.02


def test_what_xla_had_no_time_for_has_no_figure():
    result = _played(["512x1024x64"], ["pallas"])["shapes"]["512x1024x64"]
    result["131072"]["forward"] = {"even": {"dense": {"tflops": 700.0}}}
    told = table({"512x1024x64": {"rows": result}}).splitlines()
    assert told[5].endswith("| - | - | - | - | - | - | 700 | - |")
    assert told[2].endswith("| 600 / 600 / 600 | 50% / 50% / 50% | - | - | - | - | - | 1.0e-03 |") and len(told) == 8


def test_programs_that_are_not_begun_in_time_are_left_out(monkeypatch):
    monkeypatch.setattr(grouped_ours, "_BEGUN_WITHIN", 0.0)
    monkeypatch.setattr(grouped_ours, "_THREADS_OF_XLA", 1)
    timed_out, wait = threading.Event(), grouped_ours.wait

    def waited(futures, timeout):
        wait(futures, timeout)
        timed_out.set()

    monkeypatch.setattr(grouped_ours, "wait", waited)
    needed = {"a": lambda: 1, "b": lambda: timed_out.wait(10) and 2}
    of_xla = {"first": lambda: (timed_out.wait(10) and time.sleep(0.2)) or 3, "second": lambda: 4}
    assert grouped_ours._compiled(needed, of_xla) == {"a": 1, "b": 2, "first": 3}

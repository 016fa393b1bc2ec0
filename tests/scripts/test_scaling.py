"""Weak scaling on paper: it starts from what was measured, tells what cannot be, and the document has its tables."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "scaling.json"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(scaling):
    return scaling.Model(json.loads(MEASURED.read_text()))


@pytest.fixture(scope="module")
def printed(scaling):
    return scaling.tables(json.loads(MEASURED.read_text()))


def case(scaling, name):
    return next(each for each in scaling.CASES if each.name == name)


def test_one_device_comes_out_as_measured(scaling, model):
    one = case(scaling, "1.10B")
    step = model.step(model.plan(one, 1, {"data": 1}), model.factor(one.rate))
    assert step.rate == pytest.approx(model.measured["rates"]["fsdp"]["single"])
    assert not step.waits


def test_where_one_device_was_not_measured_the_smallest_run_comes_out_as_measured(scaling, model):
    found, large = model.measured["rates"]["large"], case(scaling, "6.74B")
    for guess in scaling.VARIANTS.values():
        step = model.step(
            model.plan(large, found["devices"], {"data": 1, "fsdp": -1}), model.factor("large", guess), guess
        )
        assert step.rate * found["devices"] == pytest.approx(found["tokens_per_second"], rel=0.01)


def test_rows_of_several_devices_come_out_near_what_was_measured(model):
    """A bound wide enough for other measurements; docs/scaling.md tells how near they are."""
    found = list(model.checks())
    assert len(found) >= 3
    for name, measured, paper in found:
        assert paper == pytest.approx(measured, rel=0.15), name


def test_a_second_of_exchanges_behind_products_costs_what_the_profile_says(scaling, model):
    plan = model.plan(case(scaling, "1.10B"), 8, {"data": -1, "fsdp": 8})
    waits = [sum(model.step(plan, 1.0, scaling.Guess(overlap=overlap)).waits.values()) for overlap in (None, 0.0, 1.0)]
    profile = model.measured["overlap"]
    assert waits[1] == 0 and waits[0] / waits[2] == pytest.approx(
        (profile["alone"] + profile["slowed"]) / profile["collectives"]
    )


def test_what_products_cannot_hide_costs_all_its_time(scaling, model):
    plan = model.plan(case(scaling, "1.10B"), 8, {"data": -1, "fsdp": 8})
    slow = scaling.Guess(nvlink=0.01, overlap=0.0)
    hidden = 0.5 * plan.times.products
    all_ = sum(model.step(plan, 1.0, scaling.Guess(nvlink=0.01, overlap=1.0)).waits.values())
    assert sum(model.step(plan, 1.0, slow).waits.values()) == pytest.approx(all_ - hidden)


def test_tokens_of_a_gpu_are_constant_and_meshes_that_cannot_be_are_told(printed):
    for table in printed.split("### ")[2:-1]:
        tokens = int(re.match(r".*: ([\d,]+) tokens a GPU", table)[1].replace(",", ""))
        rows = [line.split("|")[1:-1] for line in table.splitlines() if re.match(r"\| [\d,]+ ", line)]
        numbers = [[cell.strip().replace(",", "") for cell in row] for row in rows]
        for row in numbers:
            assert len(row) == 10
            assert row[2] == "" or int(row[2]) == tokens * int(row[0])
    assert "refused: mesh.fsdp=4096 cuts model.hidden_size=2048" in printed
    assert "tensor=8: does not fit" in printed


def test_a_slower_network_is_never_faster(printed):
    lines = [line.split("|")[1:-1] for line in printed.split("### ")[-1].splitlines()[2:]]
    names, rates = [cell.strip() for cell in lines[0]], lines[2:]
    assert len(rates) >= 8
    for row in rates:
        of = dict(zip(names, (cell.strip().replace(",", "") for cell in row), strict=True))
        half, as_assumed, peak = (int(of[name]) for name in ("network at half", "as assumed", "network at its peak"))
        assert half < as_assumed <= peak
        assert int(of["nothing hidden"]) <= as_assumed <= int(of["all hidden"])


def test_the_document_has_these_tables(scaling, printed):
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.written(document, printed) == document, "python scripts/scaling.py --write docs/scaling.md renews it"


def test_a_document_without_marks_is_refused(scaling):
    with pytest.raises(ValueError, match="write both into the file"):
        scaling.written("# Scaling\n", "tables")


def test_new_measurements_take_the_place_of_old_ones(scaling, tmp_path):
    mesh, doctor = tmp_path / "mesh.json", tmp_path / "doctor.json"
    results = {
        "fsdp": {
            "devices": 4,
            "tokens_per_second": 300_000,
            "single": {"tokens_per_second": 80_000},
            "collectives": 0.2,
            "collectives_alone": 0.05,
        },
        "tensor": {"error": "no room"},
        "large": {"devices": 4, "tokens_per_second": 40_000, "model": "3.01B"},
    }
    gpus = ["NVIDIA H200"] * 4
    mesh.write_text(json.dumps({"date": "2027-01-01", "gpus": gpus, "results": results}))
    rates = [
        {"bytes": 2**16, "seconds": 1e-4, "bus_bytes_per_second": 1e9},
        {"bytes": 2**28, "seconds": 1e-3, "bus_bytes_per_second": 3.214e11},
    ]
    facts = {"collective": "ppermute", "axis": "fsdp", "devices": 8, "measured": rates}
    doctor.write_text(json.dumps({"findings": [{"check": "versions"}, {"check": "collectives", "facts": facts}]}))
    old = json.loads(MEASURED.read_text())
    assert old["device"] == "H100"
    new = scaling.renewed(json.loads(MEASURED.read_text()), mesh, doctor)
    assert new["rates"]["fsdp"] == {"devices": 4, "tokens_per_second": 300_000, "single": 80_000}
    assert new["rates"]["large"] == results["large"]
    assert new["device"] == "H200"
    assert new["rates"]["tensor"] == old["rates"]["tensor"] | {"device": "H100"}, "a failed row leaves the old figure"
    assert new["overlap"] == {"collectives": 0.2, "alone": 0.05, "slowed": old["overlap"]["slowed"]}
    assert new["bus"]["gigabytes_per_second"]["collective-permute"] == 321.4
    assert (new["bus"]["devices"], new["bus"]["mebibytes"]) == (8, 256)
    assert new["date"] == "2027-01-01"

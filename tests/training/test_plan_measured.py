"""Plans against what GPUs reported: memory, and speed."""

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from stellarbyte_jax.config import MeshConfig, load
from stellarbyte_jax.training.plan import Planner
from stellarbyte_jax.training.plan_devices import KINDS

ROOT = Path(__file__).parents[2]
PRETRAIN = str(ROOT / "configs" / "pretrain.py")
H100 = KINDS["H100"]
MEASURED = {
    "baseline": [],
    "parallel residual": ["model.parallel_residual=true"],
    "GEGLU": ["model.hidden_act=gelu"],
    "the original's MLP": ["model.mlp_style=stellarbyte"],
    "LayerScale from 0.1": ["model.layer_scale_init=0.1"],
    "q/k norm": ["model.qk_norm=true"],
    "XPos, learned rates": ["model.position_embedding=xpos", "model.xpos_learnable=true"],
    "soft cap 30": ["model.attention_logit_softcap=30"],
    "window of a quarter row, 4 sinks": ["model.sliding_window=256", "model.sink_tokens=4"],
}


@pytest.mark.parametrize("name", MEASURED)
def test_memory_is_what_a_gpu_reported(name):
    """Peaks that scripts/ablation.py measured on an H100."""
    speed = json.loads((ROOT / "benchmarks" / "ablation.json").read_text())["speed"]
    assert speed["set"] == []
    found = Planner(load(PRETRAIN, MEASURED[name]), H100).plan(MeshConfig().sizes(1))
    assert found.bytes.total / 2**30 == pytest.approx(speed["results"][name]["peak_memory_gib"], rel=0.04)


@pytest.mark.parametrize("kind", ["synthetic", "real"])
def test_memory_and_speed_are_what_a_gpu_reported(kind):
    measured = json.loads((ROOT / "benchmarks" / "train.json").read_text())["results"][kind]
    found = Planner(load(PRETRAIN), H100).plan(MeshConfig().sizes(1))
    assert found.bytes.total / 2**30 == pytest.approx(measured["peak_memory_gib"], rel=0.05)
    assert found.tokens_per_second == pytest.approx(measured["tokens_per_second"], rel=0.15)
    assert found.mfu == pytest.approx(measured["mfu"], rel=0.15)


class OnGpus(NamedTuple):
    """A run of ``benchmark mesh``, whose rows are one document each.

    Attributes:
      config: that was measured.
      settings: of the run.
      device: kind of the GPUs.
      gib: peak memory of a device.
      tokens_per_second: of all devices; None: not compared.
      mfu: likewise.
    """

    config: str
    settings: list[str]
    device: str
    gib: float
    tokens_per_second: int | None
    mfu: float | None


def runs_on_gpus():
    """All rows on all devices and on one."""
    for file in ("mesh.json", "mesh-h200.json", "mesh-4.json", "mesh-4-h100.json"):
        for name, row in json.loads((ROOT / "benchmarks" / file).read_text())["results"].items():
            devices, kind = row["devices"], "H200" if "H200" in row["on"] else "H100"
            named = f"{name}, {kind}, "
            for each, label in ((row, f"{named}{devices}"), (row.get("single"), f"{named}one of {devices}")):
                if each is not None:
                    # Experts were not computed by kernels then.
                    settings = [*each["settings"], *(_BLOCKS if row["config"] == "pretrain_moe" else [])]
                    figures = (each[figure] for figure in ("peak_memory_gib", "tokens_per_second", "mfu"))
                    yield label, OnGpus(row["config"], settings, kind, *figures)


_BLOCKS = ["model.moe.implementation=xla"]


def benchmark(name):
    return json.loads((ROOT / "benchmarks" / name).read_text())


CAPACITY = benchmark("moe.json")["results"]["capacity"]  # on an H100, as the next ones
KERNELS = {
    f"experts by kernels, {step['change']}": OnGpus(
        "pretrain_moe",
        ["global_batch_size=8", *step["set"]],
        "H100",
        *(step[figure] for figure in ("peak_memory_gib", "tokens_per_second", "mfu")),
    )
    for step in benchmark("moe-steps.json")["steps"][3:]
}
RUNS = {
    **dict(runs_on_gpus()),
    "experts with a capacity": OnGpus(
        "pretrain_moe",
        ["model.moe.dispatch=capacity", "global_batch_size=8"],
        "H100",
        CAPACITY["peak_memory_gib"],
        None,
        None,
    ),
    **KERNELS,
}


@pytest.mark.parametrize("name", RUNS)
def test_memory_and_speed_of_a_mesh_are_what_gpus_reported(name):
    row = RUNS[name]
    config = load(str(ROOT / "configs" / f"{row.config}.py"), row.settings)
    devices = math.prod(max(size, 1) for size in dataclasses.asdict(config.mesh).values())
    found = Planner(config, KINDS[row.device], packed=False).plan(config.mesh.sizes(devices))
    if found.bytes.total > 0.9 * KINDS[row.device].memory:  # XLA computed values again until it fitted
        assert row.gib < found.bytes.total / 2**30
    else:
        assert found.bytes.total / 2**30 == pytest.approx(row.gib, rel=0.15)
    if row.tokens_per_second is not None:
        assert found.tokens_per_second == pytest.approx(row.tokens_per_second, rel=0.15)
        assert found.mfu == pytest.approx(row.mfu, rel=0.15)

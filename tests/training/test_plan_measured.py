"""Plans against what GPUs reported: memory, and speed."""

import json
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


def shape(hidden, layers, heads, kv_heads, mlp, length):
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size".split()
    sizes = [f"model.{name}={size}" for name, size in zip(names, (hidden, layers, heads, kv_heads, mlp), strict=True)]
    return [*sizes, f"model.max_position_embeddings={length}", f"data.sequence_length={length}"]


DENSE = shape(2048, 16, 32, 8, 8192, 2048)
LONG = shape(1024, 24, 16, 4, 3072, 32768)
LARGE = [*shape(4096, 32, 32, 32, 11008, 2048), "model.remat=full", "model.scan_unroll=1"]


class OnGpus(NamedTuple):
    """A run of ``benchmark mesh``, whose rows are one document each.

    Attributes:
      settings: of the run.
      rows: global batch size.
      devices: of ``axis``.
      axis: of the mesh.
      gib: peak memory of a device.
      tokens_per_second: of all devices.
      config: that was measured.
    """

    settings: list[str]
    rows: int
    devices: int
    axis: str
    gib: float
    tokens_per_second: int
    config: str = "pretrain"


# H200 SXM, jax 0.11.2, 2026-11-27.
ON_H200 = {
    "fsdp, one": OnGpus(DENSE, 8, 1, "fsdp", 33.95, 77_112),
    "fsdp": OnGpus(DENSE, 16, 2, "fsdp", 27.90, 147_115),
    "tensor": OnGpus(DENSE, 8, 2, "tensor", 18.30, 123_903),
    "data, one": OnGpus([], 32, 1, "data", 14.28, 474_482),
    "data": OnGpus([], 64, 2, "data", 14.32, 898_307),
    "expert, one": OnGpus([], 8, 1, "expert", 43.25, 150_474, "pretrain_moe"),
    "expert": OnGpus([], 16, 2, "expert", 38.64, 294_197, "pretrain_moe"),
    "experts with a capacity": OnGpus(["model.moe.dispatch=capacity"], 8, 1, "expert", 34.21, 0, "pretrain_moe"),
    "context, one": OnGpus(LONG, 1, 1, "context", 28.87, 57_208),
    "context": OnGpus(LONG, 1, 2, "context", 19.09, 105_808),
    "large": OnGpus(LARGE, 8, 2, "fsdp", 57.81, 19_613),
}


@pytest.mark.parametrize("name", ON_H200)
def test_memory_and_speed_of_a_mesh_are_what_gpus_reported(name):
    row = ON_H200[name]
    settings = [*row.settings, f"global_batch_size={row.rows}", "mesh.data=1", f"mesh.{row.axis}={row.devices}"]
    config = load(str(ROOT / "configs" / f"{row.config}.py"), settings)
    found = Planner(config, KINDS["H200"], packed=False).plan(config.mesh.sizes(row.devices))
    assert found.bytes.total / 2**30 == pytest.approx(row.gib, rel=0.15)
    if row.tokens_per_second:
        assert found.tokens_per_second == pytest.approx(row.tokens_per_second, rel=0.15)

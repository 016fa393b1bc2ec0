"""Plans: state against real arrays, estimates against compiled programs and a GPU's reports, and what is suggested."""

import collections
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.training import settings
from jax.sharding import NamedSharding, PartitionSpec

from stellarbyte_jax.config import ByteConfig, ConfigError, DataConfig, MeshConfig, MoEConfig, OptimizerConfig, load
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.placement import mesh_of, on_mesh, placed, shardings
from stellarbyte_jax.training.plan import Planner
from stellarbyte_jax.training.plan_devices import KINDS, device_of
from stellarbyte_jax.training.plan_exchange import Exchange, within_machine
from stellarbyte_jax.training.plan_search import search
from stellarbyte_jax.training.plan_search import settings as words
from stellarbyte_jax.training.state import create_state, state_shapes
from stellarbyte_jax.training.step import make_train_step

ROOT = Path(__file__).parents[2]
PRETRAIN = str(ROOT / "configs" / "pretrain.py")
H100 = KINDS["H100"]
LARGE = (
    "model.hidden_size=8192 model.num_hidden_layers=80 model.num_attention_heads=64 model.num_key_value_heads=8 "
    "model.intermediate_size=28672 global_batch_size=1024 model.vocab_size=128256 data.sequence_length=2048"
).split()
EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=512)


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def run_of(mesh, *, optimizer="adamw", ema=None, parts=1, **model):
    base = ByteConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=64,
        compute_dtype="float32",
        scan_unroll=None,
    )
    return settings(
        model=dataclasses.replace(base, **model),
        global_batch_size=64,
        gradient_accumulation_steps=parts,
        ema_decay=ema,
        mesh=MeshConfig(**{"data": 1, **mesh}),
        data=DataConfig(sequence_length=32, arrangement="contiguous" if "memory" in model else "packed"),
        optimizer=OptimizerConfig(name=optimizer),
    )


def plan_of(run):
    return Planner(run, H100).plan(run.mesh.sizes(8))


@functools.cache
def _compiled(mesh, model, parts):
    run = run_of(dict(mesh), parts=parts, **dict(model))
    network = ByteTransformer(run.model)
    optimizer = make_optimizer(run, network)
    with on_mesh(mesh_of(run)):
        shapes = placed(state_shapes(run, network, optimizer), network, optimizer)
        rows = None
        if mesh:
            rows = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(("data", "fsdp", "expert")))
        batch = {"tokens": jax.ShapeDtypeStruct((64, 32), np.int32, sharding=rows)}
        step = make_train_step(run, network, optimizer, lambda _: 0.0)
        places = shardings(shapes)
        step = jax.jit(step, out_shardings=None if places is None else (places, None), donate_argnums=0)
        return run, step.lower(shapes, batch).compile()


def compiled(mesh, parts=1, **model):
    return _compiled(tuple(mesh.items()), tuple(model.items()), parts)


@pytest.mark.parametrize(
    "mesh",
    [
        {},
        {"data": 8},
        {"fsdp": 8},
        {"tensor": 4, "data": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "context": 4},
        {"fsdp": 2, "expert": 4, "moe": True},
        {"expert": 2, "tensor": 2, "fsdp": 2, "moe": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_is_exact(mesh, optimizer):
    """Against the arrays of a real state on eight devices: what the first one holds."""
    mesh = dict(mesh)
    more = {"moe": EXPERTS} if mesh.pop("moe", False) else {}
    run = run_of(mesh, optimizer=optimizer, ema=0.9, num_key_value_heads=2, **more)
    network = ByteTransformer(run.model)
    rule = make_optimizer(run, network)
    with on_mesh(mesh_of(run)):
        shapes = placed(state_shapes(run, network, rule), network, rule)
        state = jax.jit(lambda: create_state(run, network, rule), out_shardings=shardings(shapes))()

    def held(tree):
        first = jax.devices()[0]
        shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first]
        return sum(shard.data.nbytes for shard in shards)

    found = plan_of(run).bytes
    assert found.weights == held(state.params)
    assert found.optimizer == held(state.opt_state)
    assert found.ema == held(state.ema)
    assert found.carried == held((state.frozen, state.carried, state.step))


def test_segment_memory_is_carried():
    more = plan_of(run_of({"fsdp": 8}, memory={"length": 16})).bytes.carried
    assert more - plan_of(run_of({"fsdp": 8})).bytes.carried > 3 * 8 * 16 * 128 * 4  # layers, rows, slots and width


def temporary(run):
    """Bytes of a plan that a program makes anew: all but state and batch."""
    found = plan_of(run).bytes
    return found.total - found.weights - found.optimizer - found.ema - found.carried - found.batch


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "context": 4}], ids=str)
def test_activations_are_ordered_as_programs_are(mesh):
    """Programs of the CPU hold more: they fuse less, and keep the scores of attention. At most four times as much."""
    ours, theirs = [], []
    for remat in ("none", "dots", "full"):
        run, program = compiled(mesh, remat=remat, scan_unroll=1)
        ours.append(temporary(run))
        theirs.append(program.memory_analysis().temp_size_in_bytes)
    assert ours[0] > ours[1] > ours[2] and theirs[0] > theirs[1] > theirs[2]
    assert all(theirs[i] / 4 < ours[i] < 1.25 * theirs[i] for i in range(3)), (ours, theirs)


def test_more_parts_hold_fewer_activations_and_gradients_twice():
    one, two = (plan_of(run_of({"data": 8}, parts=parts)).bytes for parts in (1, 2))
    assert (two.activations, two.gradients) == (one.activations // 2, 2 * one.gradients)
    programs = [compiled({"data": 8}, parts, scan_unroll=1)[1] for parts in (1, 2)]
    first, second = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert second > first / 2 + one.gradients / 2


def _devices_of_a_group(line):
    """Of a collective; XLA writes groups in three ways."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line)
    assert named is not None, line
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))


def volumes(program):
    """Bytes that a device sends by gathering, by summing (once, in parts), and by passing on, of float32 programs."""
    found = collections.Counter()
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute"
    for line in program.as_text().splitlines():
        match = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
        if match is None:
            continue
        size = sum(
            4 * math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"\w\d+\[([\d,]*)\]", match[1])
        )
        if match[2] == "collective-permute":
            found["passed"] += size
            continue
        n = _devices_of_a_group(line)
        if match[2] == "all-gather":
            found["gathered"] += size * (n - 1) // n
        else:
            found["summed"] += size * (n - 1) // (n if match[2] == "all-reduce" else 1)
    return found


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ({"data": 8}, "none"),
        ({"fsdp": 8}, "none"),
        ({"tensor": 8}, "none"),
        ({"tensor": 8}, "full"),
        ({"data": 2, "fsdp": 4}, "full"),
        ({"data": 2, "expert": 4}, "none"),
    ],
    ids=str,
)
def test_exchanges_are_those_of_the_program(mesh, remat):
    """The volumes of the collectives that XLA made. Sums are counted once: a CPU sums all where a GPU sums parts."""
    more = {"moe": EXPERTS} if "expert" in mesh else {}
    run, program = compiled(mesh, remat=remat, **more)
    theirs, ours = volumes(program), collections.Counter()
    for each in plan_of(run).exchanges:
        name = {"all-gather": "gathered", "collective-permute": "passed"}.get(each.kind, "summed")
        ours[name] += each.sent // (2 if each.kind == "all-reduce" else 1)
    for name in ("gathered", "summed"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.06 if "expert" in mesh else 0.01)


def test_keys_go_round_for_each_layer_and_back():
    """Of a ring of four: three hops of keys and values, again for the gradients, which make four."""
    (ring,) = [each for each in plan_of(run_of({"data": 2, "context": 4})).exchanges if each.axis == "context"]
    of_layer = 2 * (32 * 8) * 128 * 4  # keys and values: rows, positions, channels, float32
    assert ring.kind == "collective-permute" and ring.sent == 3 * of_layer * (3 + 3 + 4)


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


def test_a_suggestion_fits_and_improves():
    planner = Planner(load(PRETRAIN, LARGE), H100)
    asked, best = planner.plan(MeshConfig().sizes(64)), search(planner, 64).best
    assert not asked.fits and best is not None and best.fits and best.devices == 64
    again = Planner(load(PRETRAIN, [*LARGE, *words(best).split()]), H100)
    found = again.plan(again.config.mesh.sizes(64))
    assert (found.sizes, found.bytes, found.times) == (best.sizes, best.bytes, best.times), "it prints what it planned"
    small = Planner(load(PRETRAIN), H100)
    slow = small.plan(MeshConfig(data=1, context=8).sizes(8))
    best = search(small, 8).best
    assert best is not None and best.times.step < slow.times.step


def test_every_plan_that_fits_is_slower_than_the_suggestion():
    """The search leaves out what it thinks slower."""
    planner = Planner(run_of({}), dataclasses.replace(H100, memory=24 * 2**20))
    best = search(planner, 8).best
    plans = []
    for sizes in (
        (d, f, 1, c, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for c in (1, 2, 4, 8) for t in (1, 2, 4, 8)
    ):
        if math.prod(sizes) != 8:
            continue
        for parts in (1, 2, 4, 8, 16, 32, 64):
            for remat in ("none", "dots", "full"):
                mesh = dict(zip(MeshConfig.names(), sizes, strict=True))
                if 64 % (parts * mesh["data"] * mesh["fsdp"]) == 0:
                    plans.append(planner.plan(mesh, parts=parts, remat=remat))
    fitting = [each for each in plans if each.fits]
    assert 0 < len(fitting) < len(plans)
    assert best is not None and best.times.step == min(each.times.step for each in fitting)


def test_axes_of_one_machine_have_the_fast_links():
    sizes = {"data": 4, "fsdp": 2, "expert": 1, "context": 2, "tensor": 4}
    assert [within_machine(axis, sizes) for axis in ("tensor", "context", "fsdp", "data", "data+context")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    sent = Exchange("all-gather", "fsdp", "weights", 1 << 30)
    assert sent.seconds(sizes, H100) == pytest.approx(9 * sent.seconds({**sizes, "context": 1}, H100))


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "h200", "A100"])
def test_devices_by_name(name):
    assert device_of(name).name in name.upper()
    with pytest.raises(ConfigError, match="--device-kind V100 is not known: choose H100, H200, A100"):
        device_of("V100")

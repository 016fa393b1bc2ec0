"""Plans: state against real arrays, and what is suggested."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.plans import H100, plan_of, run_of

from stellarbyte_jax.config import ConfigError, MeshConfig, MoEConfig, load
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.placement import mesh_of, on_mesh, place_batches, placed, shardings
from stellarbyte_jax.training.plan import Planner
from stellarbyte_jax.training.plan_devices import device_of
from stellarbyte_jax.training.plan_exchange import Exchange, buffer_bytes, within_machine
from stellarbyte_jax.training.plan_search import REMATS, search
from stellarbyte_jax.training.plan_search import settings as words
from stellarbyte_jax.training.state import create_state, state_shapes

ROOT = Path(__file__).parents[2]
PRETRAIN = str(ROOT / "configs" / "pretrain.py")
LARGE = (
    "model.hidden_size=8192 model.num_hidden_layers=80 model.num_attention_heads=64 model.num_key_value_heads=8 "
    "model.intermediate_size=28672 global_batch_size=1024 model.vocab_size=128256 data.sequence_length=2048"
).split()
EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=512)


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


MESHES = [
    {},
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 4, "data": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 4},
    {"fsdp": 2, "expert": 4, "moe": True},
    {"expert": 2, "tensor": 2, "fsdp": 2, "moe": True},
]


@pytest.mark.parametrize(("mesh", "made"), [*((mesh, False) for mesh in MESHES), (MESHES[-1], True)], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_is_exact(mesh, optimizer, made):
    """Against a state on eight devices, from its shapes and, of one mesh, its arrays: what the first one holds."""
    mesh = dict(mesh)
    more = {"moe": EXPERTS} if mesh.pop("moe", False) else {}
    run = run_of(mesh, optimizer=optimizer, ema=0.9, num_key_value_heads=2, **more)
    network = ByteTransformer(run.model)
    rule = make_optimizer(run, network)
    with on_mesh(mesh_of(run)):
        state = placed(state_shapes(run, network, rule), network, rule)
        if made:
            state = jax.jit(lambda: create_state(run, network, rule), out_shardings=shardings(state))()

    def held(tree):
        shapes = (
            (x, x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
        )
        return sum(math.prod(shape) * x.dtype.itemsize for x, shape in shapes)

    found = plan_of(run).bytes
    assert found.weights == held(state.params)
    assert found.optimizer == held(state.opt_state)
    assert found.ema == held(state.ema)
    assert found.carried == held((state.frozen, state.carried, state.step))


def test_segment_memory_is_carried():
    more = plan_of(run_of({"fsdp": 8}, memory={"length": 16})).bytes.carried
    assert more - plan_of(run_of({"fsdp": 8})).bytes.carried > 3 * 8 * 16 * 128 * 4  # layers, rows, slots and width


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "context": 4}, {"data": 4, "tensor": 2}], ids=str)
def test_batches_have_the_bytes_of_those_on_a_device(mesh):
    """That of the step and those that are loaded meanwhile; their rows are split, their positions are not."""
    run, rows = run_of(mesh, parts=2), np.zeros((64, 32), np.int32)
    batch = {"tokens": rows, "positions": rows, "segment_ids": rows, "loss_mask": rows > 0}
    with on_mesh(mesh_of(run)):
        held = sum(x.addressable_data(0).nbytes for x in place_batches()(batch).values())
    assert plan_of(run).bytes.batch == (1 + run.data.prefetch) * held


@pytest.mark.parametrize(
    ("mesh", "model", "expected"),
    [
        ({"tensor": 2}, {}, 2 * 64 * 128 * 4),
        ({"context": 4}, {}, 2 * 16 * 128 * 2 * (4 + 4)),  # keys and values and their gradients
        ({"context": 4, "tensor": 2}, {}, 2 * 16 * 64 * 2 * (4 + 4) + 2 * 16 * 128 * 4),
        ({"context": 4, "tensor": 2}, {"num_key_value_heads": 1}, 2 * 16 * 16 * 2 * (4 + 4) + 2 * 16 * 128 * 4),
        ({"expert": 4}, {"moe": EXPERTS}, 2 * 64 * 4 * 128 * 4),  # tokens of all four, and what experts made of them
        ({"expert": 4}, {"moe": dataclasses.replace(EXPERTS, dispatch="capacity")}, 0),
        ({"data": 8}, {}, 0),
    ],
    ids=str,
)
def test_activations_of_other_devices(mesh, model, expected):
    """Of two rows of 32 positions, width 128, in float32."""
    sizes = {name: mesh.get(name, 1) for name in MeshConfig.names()}
    assert buffer_bytes(run_of({}, **model).model, 2, 32, sizes) == expected


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
            for remat in REMATS:
                mesh = dict(zip(MeshConfig.names(), sizes, strict=True))
                if 64 % (parts * mesh["data"] * mesh["fsdp"]) == 0:
                    plans.append(planner.plan(mesh, parts=parts, remat=remat))
    fitting = [each for each in plans if each.fits]
    assert 0 < len(fitting) < len(plans)
    assert best is not None and best.times.step == min(each.times.step for each in fitting)


def test_parts_of_a_batch_are_divided_among_experts_too():
    """Where nothing fits, a search looks at every number of parts that there can be, and at no other."""
    planner = Planner(run_of({}, rows=4, moe=EXPERTS, num_hidden_layers=1), dataclasses.replace(H100, memory=1))
    found = search(planner, 2)
    assert found.best is None and found.smallest is not None
    shards = math.prod(found.smallest.sizes[axis] for axis in ("data", "fsdp", "expert"))
    assert found.smallest.config.gradient_accumulation_steps * shards == 4


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


@pytest.mark.parametrize(
    ("device", "named", "planned"), [("H200", "auto", "auto"), ("H100", "pallas", "pallas"), ("A100", "auto", "xla")]
)
def test_experts_by_kernels_are_planned_for_hopper_gpus(device, named, planned):
    run = run_of({}, moe=dataclasses.replace(EXPERTS, implementation=named))
    assert Planner(run, device_of(device)).config.model.moe.implementation == planned


def test_kernels_for_hopper_gpus_are_not_planned_for_others():
    run = run_of({}, moe=dataclasses.replace(EXPERTS, implementation="pallas"))
    with pytest.raises(
        ConfigError, match=r"implementation=pallas is of Hopper GPUs, which A100 is not: set it to auto"
    ):
        Planner(run, device_of("A100"))


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "h200", "A100"])
def test_devices_by_name(name):
    assert device_of(name).name in name.upper()
    with pytest.raises(ConfigError, match="--device-kind V100 is not known: choose H100, H200, A100"):
        device_of("V100")

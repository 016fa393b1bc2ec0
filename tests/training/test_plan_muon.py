"""What plans say of Muon, against compiled programs of eight devices."""

import jax
import optax
import pytest
from helpers.plans import H100, plan_of, planned_volumes, run_of, volumes

from stellarbyte_jax.config import MoEConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_uses, trained
from stellarbyte_jax.model.trees import partition
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.placement import mesh_of, on_mesh, placed, shardings
from stellarbyte_jax.training.plan import Planner
from stellarbyte_jax.training.plan_muon import of_update
from stellarbyte_jax.training.state import state_shapes

EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=512)
MESHES = [
    ({"data": 8}, {}),
    ({"fsdp": 8}, {}),
    ({"fsdp": 8}, {"num_hidden_layers": 8}),
    ({"fsdp": 2, "tensor": 2, "data": 2}, {"num_key_value_heads": 4}),
    ({"expert": 4, "fsdp": 2}, {"moe": EXPERTS}),
]


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def program_of(run):
    """An update and what it does to weights, alone."""
    network = ByteTransformer(run.model)
    rule = make_optimizer(run, network)

    def update(params, state, gradients):
        updates, state = rule.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with on_mesh(mesh_of(run)):
        shapes = placed(state_shapes(run, network, rule), network, rule)
        places = shardings(shapes)
        step = jax.jit(update, out_shardings=(places.params, places.opt_state), donate_argnums=(0, 1))
        return step.lower(shapes.params, shapes.opt_state, shapes.params).compile()


def update_of(run):
    planner, sizes = Planner(run, H100), run.mesh.sizes(8)
    uses, _ = partition(param_uses(planner.model), trained(planner.model))
    return of_update(run.optimizer.name, planner.placed(sizes).params, uses, sizes)


@pytest.mark.parametrize(("mesh", "more"), MESHES, ids=str)
def test_updates_exchange_and_hold_what_the_program_does(mesh, more):
    """Programs of the CPU hold more, as they copy what is transposed; up to twice as much."""
    run = run_of(mesh, optimizer="muon", hidden_size=256, intermediate_size=1024, **more)
    program, found = program_of(run), update_of(run)
    exchanged = volumes(program.as_text())
    assert exchanged["gathered"] == 0
    assert sum(each.sent for each in found.exchanges) == pytest.approx(exchanged["exchanged"], rel=1e-6)
    assert bool(found.exchanges) == (mesh != {"data": 8})
    theirs = program.memory_analysis().temp_size_in_bytes
    assert theirs / 2 < found.buffers < 1.3 * theirs


def test_a_step_has_one_update_whatever_its_parts():
    one, two = (plan_of(run_of({"fsdp": 8}, optimizer="muon", parts=parts)) for parts in (1, 2))
    assert planned_volumes(one)["exchanged"] == planned_volumes(two)["exchanged"] > 0
    assert planned_volumes(two)["gathered"] == 2 * planned_volumes(one)["gathered"]
    assert {each.axis for each in one.exchanges if each.what == "matrices"} == {"fsdp"}


def test_an_update_takes_memory_where_the_layers_take_less_and_time():
    def plan(optimizer, rows):
        return plan_of(run_of({"data": 8}, optimizer=optimizer, rows=rows, hidden_size=256, intermediate_size=1024))

    few, adamw = plan("muon", 8), plan("adamw", 8)
    update = update_of(few.config)
    layers = ("activations", "working", "logits", "collectives")
    assert sum(getattr(few.bytes, name) for name in layers) == update.buffers
    assert update.buffers > sum(getattr(adamw.bytes, name) for name in layers)
    assert plan("muon", 4096).bytes.working == plan("adamw", 4096).bytes.working
    # Three layers of four matrices of 256 x 256 and three of 256 x 1024; five rounds of three products, in TF32.
    products = 3 * 5 * (4 * 6 * 256**3 + 3 * (4 * 256 * 256 * 1024 + 2 * 256**3))
    assert few.times.products - adamw.times.products == pytest.approx(2 * products / (0.7 * H100.flops))

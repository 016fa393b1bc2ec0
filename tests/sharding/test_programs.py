"""What compiled programs hold and exchange. On eight CPU devices."""

import collections
import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from helpers.collectives import of_loops
from helpers.training import RECORDER, settings
from jax.sharding import NamedSharding, PartitionSpec

from stellarbyte_jax.config import ByteConfig, MeshConfig, MoEConfig, OptimizerConfig
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.placement import mesh_of, on_mesh, placed, shardings
from stellarbyte_jax.training.programs import compiled_create_state
from stellarbyte_jax.training.state import state_shapes
from stellarbyte_jax.training.step import make_train_step

ROWS, T, D, F, L = 8, 16, 128, 512, 8
EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=F)
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def compiled(mesh, optimizer=None, dtype="float32", **model):
    """The training step, of the RECORDER or of an optimizer that is named, and the shapes of its state."""
    return _compiled(tuple({"data": 1, **mesh}.items()), optimizer, dtype, tuple(model.items()))


@functools.cache
def _compiled(mesh, optimizer, dtype, model):
    config = ByteConfig(
        vocab_size=64,
        hidden_size=D,
        num_attention_heads=8,
        intermediate_size=F,
        max_position_embeddings=64,
        compute_dtype=dtype,
        **{"num_hidden_layers": L, **dict(model)},
    )
    run = settings(model=config, global_batch_size=ROWS, mesh=MeshConfig(**dict(mesh)))
    network, rule = ByteTransformer(config), RECORDER
    if optimizer is not None:
        run = dataclasses.replace(run, optimizer=OptimizerConfig(name=optimizer))
        rule = make_optimizer(run, network)
    with on_mesh(mesh_of(run)):
        shapes = placed(state_shapes(run, network, rule), network, rule)
        rows = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(("data", "fsdp", "expert")))
        batch = {"tokens": jax.ShapeDtypeStruct((ROWS, T), np.int32, sharding=rows)}
        step = make_train_step(run, network, rule, lambda _: 0.0)
        step = jax.jit(step, out_shardings=(shardings(shapes), None), donate_argnums=0)
        return step.lower(shapes, batch).compile(), shapes


def bytes_of(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mesh", "moe"), [({"fsdp": 4, "tensor": 2}, None), ({"expert": 8}, EXPERTS)], ids=["fsdp x tensor", "expert"]
)
def test_a_first_state_is_made_in_parts(mesh, moe):
    """No device has a weight, or what the optimizer keeps of it, whole on the way."""
    model = dataclasses.replace(
        ByteConfig(vocab_size=64, hidden_size=D, num_attention_heads=8, intermediate_size=F, num_hidden_layers=L),
        **({} if moe is None else {"moe": moe}),
    )
    run = settings(model=model, global_batch_size=ROWS, mesh=MeshConfig(data=1, **mesh), ema_decay=0.9)
    network = ByteTransformer(model)
    rule = make_optimizer(run, network)
    with on_mesh(mesh_of(run)):
        shapes = placed(state_shapes(run, network, rule), network, rule)
        create = compiled_create_state(run, network, rule, shapes)
        assert isinstance(create, jax.stages.Wrapped), "one program makes all of it where it stays"
        memory = create.lower().compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.05 * bytes_of(shapes) / 8  # vectors are whole
    assert memory.temp_size_in_bytes < bytes_of(shapes.params) / 8


def exchanged(program):
    """Of each kind of collective the numbers of elements of its results, in the order of the program."""
    found = {kind: [] for kind in KINDS}
    for line in program.as_text().splitlines():
        match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match:
            sizes = re.findall(r"\w\d+\[([\d,]*)\]", match[1])
            found[match[2]] += [math.prod(map(int, filter(None, size.split(",")))) for size in sizes]
    return found


def weights_of(shapes):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))


@pytest.mark.parametrize(
    ("dtype", "remat", "times"),
    [("float32", "none", 1), ("float32", "dots", 2), ("bfloat16", "none", 1), ("bfloat16", "weights", 2)],
)
def test_weights_are_gathered_once_or_again_in_the_backward_pass(dtype, remat, times):
    """Whatever they are cast to."""
    layers = 2
    with jax.numpy_dtype_promotion("standard"):  # jax mixes types inside of its attention, backward too
        program, _ = compiled({"fsdp": 8}, remat=remat, scan_unroll=None, dtype=dtype, num_hidden_layers=layers)
    sizes = exchanged(program)["all-gather"]
    assert (sizes.count(D * 2 * F), sizes.count(D * F)) == (times * layers,) * 2


@pytest.mark.parametrize("remat", ["weights", "full"])
def test_weights_that_are_kept_in_parts_are_whole_one_layer_at_a_time(remat):
    program, shapes = compiled({"fsdp": 8}, remat=remat)
    weights = weights_of(shapes)
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes < 4 * 2 * weights / 8 * 1.1  # the weights, and what the optimizer keeps
    assert memory.temp_size_in_bytes < 4 * weights * 0.9  # of all layers whole it would be more than all of them
    found = exchanged(program)
    largest = max(found["all-gather"])
    assert largest <= D * 2 * F, "one matrix of one layer"
    assert not found["all-to-all"] and not found["collective-permute"]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_head_are_cut_as_its_weights_are(tied):
    """Those of the table of the embedding where it is tied: nothing is dealt out anew."""
    found = exchanged(compiled({"fsdp": 8}, tie_word_embeddings=tied, remat="weights", num_hidden_layers=1)[0])
    assert not found["all-to-all"] and not found["collective-permute"]


def test_copies_exchange_gradients_alone():
    program, shapes = compiled({"data": 8})
    found = exchanged(program)
    assert max(found["all-reduce"]) == D * 2 * F, "those of a layer, while the one before is computed"
    assert sum(found["all-reduce"]) < weights_of(shapes) / L * 1.1
    assert not any(found[kind] for kind in KINDS if kind != "all-reduce")


def test_heads_and_channels_exchange_activations_alone():
    """Between layers tokens are split: they are gathered before each part of a layer, and summed after it."""
    program, shapes = compiled({"tensor": 8}, remat="weights")
    found = exchanged(program)
    activations = ROWS * T * D
    assert max(found["all-gather"]) == activations and max(found["reduce-scatter"]) <= activations
    assert max(found["all-reduce"]) <= activations  # a machine without reduce-scatter sums, then cuts
    assert weights_of(shapes) > 10 * activations
    assert not found["all-to-all"] and not found["collective-permute"]


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_tokens_go_to_experts_whose_weights_stay(dispatch):
    program, _ = compiled({"expert": 8}, remat="weights", moe=dataclasses.replace(EXPERTS, dispatch=dispatch))
    found = exchanged(program)
    assert bool(found["all-to-all"]) == (dispatch == "capacity")
    expert = D * F
    assert all(size < 8 * expert for size in found["all-gather"])
    if dispatch == "dropless":
        assert ROWS * T * D in found["all-gather"]


# Weights of a layer: of queries, keys, values, outputs, and two of the MLP. On CPUs a sum stays whole where a GPU keeps
# its own part of it, so both kinds of sums count as one.
WEIGHTS = 6
ATTENTION = 4  # weights that are not experts


@pytest.mark.parametrize(
    ("mesh", "moe", "forward", "backward"),
    [
        (
            {"fsdp": 8},
            None,
            {("gather", "fsdp"): WEIGHTS},
            {("gather", "fsdp"): WEIGHTS, ("sum", "fsdp"): WEIGHTS},
        ),
        (  # before attention and before the MLP, and after each; backward a sum for each weight that read positions
            {"tensor": 8},
            None,
            {("gather", "tensor"): 2, ("sum", "tensor"): 2},
            {("gather", "tensor"): 2, ("sum", "tensor"): 3 + 1},
        ),
        (  # keys and values: before the loop and in it; backward their gradients too, behind it and home; and weights
            {"context": 4},
            None,
            {("pass", "context"): 2 + 2},
            {("pass", "context"): 2 + 4 + 2 + 2, ("sum", "context"): WEIGHTS},
        ),
        (
            {"expert": 8},
            dataclasses.replace(EXPERTS, dispatch="dropless"),  # tokens are gathered, and sums of experts scattered
            {("gather", "expert"): ATTENTION + 1, ("sum", "expert"): 1},
            {("gather", "expert"): ATTENTION + 1, ("sum", "expert"): ATTENTION + 1},
        ),
        (
            {"expert": 8},
            dataclasses.replace(EXPERTS, dispatch="capacity"),  # tokens go to experts and back
            {("gather", "expert"): ATTENTION, ("all-to-all", "expert"): 2},
            {("gather", "expert"): ATTENTION, ("all-to-all", "expert"): 2, ("sum", "expert"): ATTENTION},
        ),
        (  # each axis does what it does alone
            {"fsdp": 2, "tensor": 2, "context": 2},
            None,
            {("gather", "fsdp"): WEIGHTS, ("gather", "tensor"): 2, ("sum", "tensor"): 2, ("pass", "context"): 2},
            {
                ("gather", "fsdp"): WEIGHTS,
                ("gather", "tensor"): 2,
                ("sum", "tensor"): 3 + 1,
                ("pass", "context"): 2 + 2 + 2,
                ("sum", "fsdp"): WEIGHTS,
                ("sum", "context"): WEIGHTS,
            },
        ),
    ],
    ids=["fsdp", "tensor", "context", "dropless", "capacity", "fsdp x tensor x context"],
)
def test_collectives_of_a_layer(mesh, moe, forward, backward):
    """How many arrays a layer exchanges over which axis; those smaller than a device's activations do not count."""
    mesh = {"data": 1, **mesh}
    program, _ = compiled(mesh, remat="weights", **({} if moe is None else {"moe": moe}))
    devices = make_mesh(MeshConfig(**mesh).sizes(math.prod(mesh.values())))
    found = of_loops(program, devices, "layers/while", smallest=ROWS * T * D // 8)
    assert [named(each) for each in found] == [forward, backward]


NAMES = {"all-gather": "gather", "all-reduce": "sum", "reduce-scatter": "sum", "collective-permute": "pass"}


def named(found):
    counted = collections.Counter()
    for (kind, axes), count in found.items():
        counted[NAMES.get(kind, kind), axes] += count
    return dict(counted)


@pytest.mark.parametrize("mesh", [{"expert": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_muon_has_its_matrices_whole_a_share_on_each_device(mesh):
    """It gathers nothing: what a device keeps goes out once in parts of matrices, and comes back."""
    of_experts = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=256)
    more = {"moe": of_experts} if "expert" in mesh else {}
    program, shapes = compiled(mesh, "muon", remat="weights", **more)
    kept = weights_of(shapes) / 8
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes < 4 * 2 * kept * 1.1
    assert memory.temp_size_in_bytes < 4 * 8 * kept * 0.9
    found = exchanged(program)
    assert max(found["all-gather"]) <= D * 2 * F, "one matrix of one layer"
    assert max(found["all-reduce"]) <= D * 2 * F and not found["collective-permute"]
    assert 0 < sum(found["all-to-all"]) < 2 * kept

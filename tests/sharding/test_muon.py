"""Muon's update on meshes is the one of optax on one device. On eight CPU devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import flat, settings
from jax.sharding import NamedSharding, PartitionSpec

from stellarbyte_jax.config import ByteConfig, MeshConfig, MoEConfig, OptimizerConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses, trained
from stellarbyte_jax.model.trees import partition
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.matrices import Stack, deals, each_matrix
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.muon import muon, stack_of
from stellarbyte_jax.training.placement import mesh_of, on_mesh, placed, shardings
from stellarbyte_jax.training.state import TrainState, state_shapes

BASE = ByteConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=64,
    max_position_embeddings=32,
    compute_dtype="float32",
)
EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=16, n_shared_experts=1)
MODELS = {
    "dense": {},
    "one layer": {"num_hidden_layers": 1},
    "eight layers": {"num_hidden_layers": 8},
    "experts": {"moe": EXPERTS},
    "experts in every second layer": {"moe": dataclasses.replace(EXPERTS, decoder_sparse_step=2)},
    "a pool of experts": {"moe": dataclasses.replace(EXPERTS, shared_pool=True, n_shared_experts=0)},
}
RULE = {"eps": 1e-8, "b1": 0.9, "b2": 0.95}


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def of_optax(uses):
    def numbers(use):
        if not use.is_hidden_matrix:
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=use.contracted, output_axis=use.output)

    return optax.contrib.muon(
        1.0,
        eps=RULE["eps"],
        adam_b1=RULE["b1"],
        adam_b2=RULE["b2"],
        consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree.map(numbers, uses),
    )


@functools.cache
def model_of(name):
    """A model, the uses of its weights, and gradients of two steps."""
    model = ByteTransformer(dataclasses.replace(BASE, **MODELS[name]))
    is_weight = trained(model)
    uses, _ = partition(param_uses(model), is_weight)
    shapes, _ = partition(param_shapes(model), is_weight)
    random = np.random.default_rng(0)
    steps = [jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes) for _ in range(2)]
    return model, uses, steps


def two_steps(rule, state, steps):
    run, found = jax.jit(rule.update), []
    with jax.numpy_dtype_promotion("standard"):
        for gradients in steps:
            updates, state = run(gradients, state, gradients)
            found.append(updates)
    return found, state


@functools.cache
def expected(name):
    _, uses, steps = model_of(name)
    rule = of_optax(uses)
    return jax.device_get(two_steps(rule, rule.init(steps[0]), steps))


def check(found, wanted):
    found = jax.device_get(found)
    assert jax.tree.structure(found) == jax.tree.structure(wanted), "checkpoints hold this structure"
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("dense", {"fsdp": 8}),
        ("one layer", {"fsdp": 2, "tensor": 2, "data": 2}),
        ("eight layers", {"fsdp": 4, "tensor": 2}),
        ("experts", {"expert": 2, "fsdp": 2, "tensor": 2}),
        ("experts in every second layer", {"fsdp": 2, "expert": 4}),
        ("a pool of experts", {"expert": 2, "context": 2, "fsdp": 2}),
    ],
    ids=str,
)
def test_updates_are_those_of_optax(name, mesh):
    model, uses, steps = model_of(name)
    rule = muon(uses, **RULE)
    config = settings(
        model=model.config,
        global_batch_size=8,
        mesh=MeshConfig(**{"data": 1, **mesh}),
        optimizer=OptimizerConfig(name="muon"),
    )
    with on_mesh(mesh_of(config)):
        shapes = placed(state_shapes(config, model, rule), model, rule)
        places: TrainState = shardings(shapes)
        steps = [jax.device_put(gradients, places.params) for gradients in steps]
        state = jax.jit(rule.init, out_shardings=places.opt_state)(steps[0])
        found, after = two_steps(rule, state, steps)
    check((found, after), expected(name))
    kept = places.opt_state.inner_states["muon"].inner_state[0].mu
    ours = after.inner_states["muon"].inner_state[0].mu
    for x, place in zip(jax.tree.leaves(ours), jax.tree.leaves(kept), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.parametrize(
    ("tensor", "together", "matrices"),
    [(1, ("q", "o", "kv", "gate_up", "down"), (6, 2)), (2, ("qo", "kv", "gate_up down"), (9, 2))],
)
def test_stacks_that_devices_do_not_divide_go_together(tensor, together, matrices):
    """Of three layers on four devices k and v; with ``tensor`` more have parts alike, whichever way round they are."""
    _, uses, steps = model_of("dense")
    sizes = {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": tensor}
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    hidden = {path: use for path, use in flat(uses).items() if use.is_hidden_matrix}
    stacks = {path: stack_of(use, flat(steps[0])[path].shape, mesh) for path, use in hidden.items()}
    found = deals(list(stacks.values()), sizes)
    names = [path.rpartition("/")[2] for path in stacks]
    groups = {frozenset(names[i] for i in deal.members): deal for deal in found}
    words = [frozenset(names.split() if "_" in names or names == "down" else names) for names in together]
    assert set(groups) == set(words)
    mlp = next(deal for names, deal in groups.items() if "gate_up" in names)
    assert ((mlp.matrices, mlp.each), mlp.whole) == (matrices, (32, 64))
    eight = [stack_of(use, (8, *stacks[path].shape[1:]), mesh) for path, use in hidden.items()]
    assert [deal.members for deal in deals(eight, sizes)] == [(i,) for i in range(len(eight))]


def test_matrices_are_put_together_in_their_order():
    """Orthogonalising would not tell: with rows or columns in another order it gives the same in that order."""

    def weighted(x_NIO):
        i_I, j_O = (jnp.arange(size, dtype=jnp.float32) for size in x_NIO.shape[1:])
        return x_NIO * (i_I[None, :, None] + j_O[None, None, :]) * jnp.sum(x_NIO, axis=(1, 2), keepdims=True)

    random = np.random.default_rng(0)
    layouts = [
        ((3, 16, 8, 4), (1,), (2, 3), PartitionSpec(None, ("fsdp", "expert"), "tensor")),
        ((3, 8, 4, 16), (1, 2), (3,), PartitionSpec(None, "tensor", None, ("fsdp", "expert"))),
        ((2, 3, 8, 2, 4), (2,), (4,), PartitionSpec("expert", None, "fsdp", None, "tensor")),
        ((8, 4, 4), (1,), (2,), PartitionSpec("fsdp")),
    ]
    arrays = [random.normal(size=shape).astype(np.float32) for shape, *_ in layouts]
    stacks = [Stack(*layout) for layout in layouts]
    expected = each_matrix(weighted, arrays, [dataclasses.replace(stack, spec=PartitionSpec()) for stack in stacks])
    np.testing.assert_allclose(expected[3], jax.jit(weighted)(arrays[3]), rtol=1e-6)
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, stack.spec)) for x, stack in zip(arrays, stacks, strict=True)]
        found = jax.jit(lambda arrays: each_matrix(weighted, arrays, stacks))(placed)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

"""Weights that go straight into their parts: devices hold their own, the host a layer. On eight CPU devices."""

import contextlib
import math

import jax
import numpy as np
import pytest
from helpers.hf_models import assert_same_tree, random_model
from helpers.live_arrays import LiveArrays

from stellarbyte_jax import from_pretrained, make_mesh, place_weights, save_pretrained
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.hf import directory, tensors
from stellarbyte_jax.hf.directory import open_pretrained
from stellarbyte_jax.model import placement
from stellarbyte_jax.sharding import hosts

MESHES = ({"fsdp": 8}, {"fsdp": 2, "tensor": 2})


def held(trees):
    """Bytes on each device."""
    bytes_of = dict.fromkeys(range(8), 0)
    for leaf in jax.tree.leaves(trees):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for device in leaf.sharding.device_set:  # asked for as shards, parts become arrays that count twice
            bytes_of[device.id] += part
    return bytes_of


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model, params = random_model(num_hidden_layers=6, intermediate_size=64, vocab_size=64)
    path = tmp_path_factory.mktemp("weights")
    save_pretrained(path / "hf", model, params)
    save_initial(path / "run", model.config, params)
    return path, model, params


@pytest.fixture
def host(monkeypatch):
    """What the host reads, and the most that devices hold meanwhile beside what they held before."""
    memory = LiveArrays()
    memory.most = 0
    read, split = directory.WeightFiles.read, hosts.split_array
    layer, whole = tensors._read_layer, tensors._read_leaf
    before = jax.live_arrays()  # held, so that no other array gets the id of one

    def watched(array, place):
        made = split(array, place)
        new = [x for x in jax.live_arrays() if not any(x is other for other in before)]
        memory.most = max(memory.most, *held(new).values())
        return made

    monkeypatch.setattr(directory.WeightFiles, "read", lambda files, name: memory.copy(read(files, name)))
    monkeypatch.setattr(tensors, "_read_layer", lambda *args: memory.copy(layer(*args)))
    monkeypatch.setattr(tensors, "_read_leaf", lambda *args: memory.copy(whole(*args)))
    monkeypatch.setattr(placement, "split_array", watched)
    return memory


@pytest.mark.parametrize("sizes", MESHES)
def test_a_directory_is_read_layer_by_layer_into_parts(written, host, sizes):
    path, model, params = written
    mesh = make_mesh(sizes)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with jax.set_mesh(mesh):
        _, placed = from_pretrained(path / "hf")
    for leaf, place in zip(jax.tree.leaves(placed), jax.tree.leaves(placement.weight_places(model, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    share = max(held(placed).values())
    assert share < 1.15 * whole / mesh.size  # vectors are whole
    largest_layer = params["layers"]["0"]["mlp"]["gate_up"][0].nbytes
    assert host.peak <= 2 * largest_layer < 0.15 * whole  # one layer, and one tensor of it
    assert 0 < host.most <= share + 2 * largest_layer
    assert_same_tree(jax.device_get(placed), params)


@pytest.mark.parametrize("kind", ["numpy", "lazy", "jax"])
def test_weights_of_every_kind_are_placed(written, kind):
    path, model, params = written
    mesh = make_mesh(MESHES[1])
    with contextlib.ExitStack() as stack:
        given = params if kind == "numpy" else jax.tree.map(jax.device_put, params)
        if kind == "lazy":
            _, given = stack.enter_context(open_pretrained(path / "hf"))
        placed = place_weights(model, given, mesh)
    assert max(held(placed).values()) < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert_same_tree(jax.device_get(placed), params)


def test_the_weights_of_a_run_are_read_into_parts(written):
    path, model, params = written
    mesh = make_mesh(MESHES[1])
    with jax.set_mesh(mesh):
        placed = load_weights(path / "run")[1]
    assert jax.tree.map(lambda x: x.sharding.spec, placed) == jax.tree.map(
        lambda place: place.spec, placement.weight_places(model, mesh)
    )
    assert_same_tree(jax.device_get(placed), params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(load_weights(path / "run")[1]))

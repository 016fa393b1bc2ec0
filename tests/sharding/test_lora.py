"""Adapters on every mesh: loss and gradients are those of one device. On eight CPU devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers.adapters import learnt
from helpers.training import MODEL, RECORDER, flat, packed_batch, rate_at, settings

from stellarbyte_jax.config import LossConfig, MeshConfig, MoEConfig
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import partition
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.placement import mesh_of, on_mesh, place_batches, placed, shardings
from stellarbyte_jax.training.state import create_state, state_shapes
from stellarbyte_jax.training.step import make_train_step

ROWS = 16
DENSE = ("q", "k", "v", "o", "gate_up", "down", "embed", "head")
EXPERTS = ("o", "experts", "router", "head")
MOE = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=16, n_shared_experts=1)
ROOM = dataclasses.replace(MOE, dispatch="capacity", capacity_factor=8.0, shared_pool=True, n_shared_experts=0)
KINDS = {
    "dense": ({}, {"target_modules": DENSE, "regularization": 0.5}),
    "tied": ({"tie_word_embeddings": True, "remat": "weights"}, {"target_modules": ("embed", "o", "down")}),
    "dora": ({"remat": "dots"}, {"dora": True, "target_modules": ("all-linear", "head")}),
    "experts": ({"moe": MOE, "num_hidden_layers": 1}, {"target_modules": EXPERTS}),
    "experts with room": ({"moe": ROOM, "remat": "full"}, {"target_modules": ("experts", "router", "v")}),
    "dora of experts": ({"moe": MOE}, {"dora": True, "target_modules": ("experts", "shared", "router")}),
}
FAST = [
    ("dense", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("experts", {"expert": 2, "context": 2, "tensor": 2}),
]
SLOW = [
    ("dora", {"fsdp": 2, "context": 2, "tensor": 2}),
    *((kind, {axis: 8}) for kind in ("dense", "tied") for axis in ("data", "fsdp", "tensor", "context")),
    *((kind, {"expert": 2, "fsdp": 2, "tensor": 2}) for kind in ("experts", "experts with room", "dora of experts")),
    ("experts", {"expert": 8}),
    ("dora of experts", {"expert": 2, "context": 2, "tensor": 2}),
    ("tied", {"fsdp": 2, "context": 2, "tensor": 2}),
]


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def config_of(kind, **changes):
    model, lora = KINDS[kind]
    model = dataclasses.replace(MODEL, vocab_size=64, num_attention_heads=8, lora={"r": 4, **lora}, **model)
    loss = LossConfig(router_load=0.1) if "moe" in KINDS[kind][0] else LossConfig()
    return settings(model=model, global_batch_size=ROWS, ema_decay=0.9, loss=loss, **changes)


def batch_of(config):
    batch = packed_batch(batch=ROWS)
    batch["tokens"] %= config.model.vocab_size
    return batch


@functools.cache
def first_state(kind):
    """On one device, with adapters that have learnt something."""
    config = config_of(kind)
    state = jax.jit(lambda: create_state(config, ByteTransformer(config.model), RECORDER))()
    adapters, _ = split(state.weights)
    moved = partition(learnt(adapters), lambda path: not path[-1].endswith("_scale"))[0]
    return state.replace(params=moved)


@functools.cache
def expected(kind):
    config = config_of(kind)
    step = make_train_step(config, ByteTransformer(config.model), RECORDER, functools.partial(rate_at, config))
    return jax.device_get(jax.jit(step)(first_state(kind), batch_of(config)))


@pytest.mark.parametrize(("kind", "mesh"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_step_is_that_of_one_device(kind, mesh):
    config = config_of(kind, mesh=MeshConfig(**{"data": 1, **mesh}))
    model = ByteTransformer(config.model)
    with on_mesh(mesh_of(config)):
        places = shardings(placed(state_shapes(config, model, RECORDER), model, RECORDER))
        step = make_train_step(config, model, RECORDER, functools.partial(rate_at, config))
        step = jax.jit(step, out_shardings=(places, None))
        found = jax.device_get(step(jax.device_put(first_state(kind), places), place_batches()(batch_of(config))))
    (state, metrics), (wanted, wanted_metrics) = found, expected(kind)
    for name in ("loss", "cross_entropy", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=2e-5)
    gradients = flat(state.opt_state)
    assert gradients.keys() == flat(wanted.opt_state).keys() and all("_lora_" in path for path in gradients)
    for path, slope in flat(wanted.opt_state).items():
        size = np.abs(slope).max()
        assert size > 0, path
        np.testing.assert_allclose(gradients[path], slope, atol=2e-5 * size, err_msg=path)

"""Sizes of meshes, and what they may cut."""

import dataclasses
import re

import pytest

from stellarbyte_jax.config import ByteConfig, ConfigError, MemoryConfig, MeshConfig, MoEConfig
from stellarbyte_jax.config.mesh import check_mesh

MODEL = ByteConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=48,
)
EXPERTS = MoEConfig(num_experts=6, num_experts_per_tok=2, intermediate_size=16)
SCARCE = MoEConfig(
    num_experts=12, num_experts_per_tok=4, intermediate_size=16, dispatch="capacity", capacity_factor=1, min_capacity=1
)


@pytest.mark.parametrize(
    ("given", "devices", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1, 1)),
        ({}, 8, (8, 1, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, 8, (1, 4, 1, 1, 2)),
        ({"data": 1}, 8, (1, 1, 1, 1, 1)),
        ({"data": 2, "expert": 2, "context": 1}, 8, (2, 1, 2, 1, 1)),
    ],
)
def test_what_is_left_goes_to_the_axis_that_asks_for_it(given, devices, sizes):
    assert MeshConfig(**given).sizes(devices) == dict(zip(MeshConfig.names(), sizes, strict=True))


@pytest.mark.parametrize(
    ("given", "devices", "told"),
    [
        (
            {"tensor": 3},
            8,
            "mesh.tensor=3 does not divide the 8 devices: set sizes whose product divides 8, or mesh.data",
        ),
        (
            {"fsdp": 2, "tensor": 8},
            8,
            "mesh.fsdp=2 mesh.tensor=8 asks for 16 devices, and there are 8: lower it, or add",
        ),
        ({"data": 4}, 2, "mesh.data=4 asks for 4 devices, and there are 2: lower it, or add devices"),
    ],
)
def test_meshes_that_the_devices_do_not_make_are_refused(given, devices, told):
    with pytest.raises(ConfigError) as error:
        MeshConfig(**given).sizes(devices)
    assert str(error.value).startswith(told)


def test_one_axis_alone_is_what_is_left():
    with pytest.raises(ConfigError, match=r"mesh\.data and mesh\.fsdp are -1, and one axis alone can be what is left"):
        MeshConfig(fsdp=-1)
    for size in (0, -2):
        with pytest.raises(ConfigError, match=r"MeshConfig\.tensor must be"):
            MeshConfig(tensor=size)


def checked(changes=None, rows=16, parts=1, length=32, **sizes):
    model = dataclasses.replace(MODEL, **(changes or {}))
    check_mesh({**dict.fromkeys(MeshConfig.names(), 1), **sizes}, model, rows, parts, length)


def test_what_every_axis_divides_is_taken():
    checked(data=2, fsdp=2, expert=2, context=4, tensor=2, changes={"moe": EXPERTS})
    checked(tensor=8)  # two devices for each key/value head
    checked(rows=16, parts=4, data=4)
    for implementation in ("auto", "cudnn", "pallas", "xla"):
        checked(context=2, changes={"attention_implementation": implementation})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"data": 2, "fsdp": 3},
            "mesh.data=2 x mesh.fsdp=3 cuts the rows of a batch, and global_batch_size=16 does not divide by 6: set a "
            "multiple of 6",
        ),
        (
            {"data": 8, "parts": 4},
            "mesh.data=8 cuts the rows of a batch, and global_batch_size=16 in gradient_accumulation_steps=4 parts "
            "does not divide by 8: set a multiple of 32",
        ),
        (
            {"fsdp": 3, "expert": 2, "rows": 24},
            "mesh.fsdp=3 x mesh.expert=2 cuts model.hidden_size=32, which it does not divide: set mesh.fsdp=1 "
            "mesh.expert=1",
        ),
        (
            {"context": 2, "changes": {"attention_implementation": "reference"}},
            "mesh.context=2 cuts rows by position, and the reference of attention reads rows as a whole: set "
            "model.attention_implementation=auto, or mesh.context=1",
        ),
        (
            {"fsdp": 12, "rows": 24},
            "mesh.fsdp=12 cuts model.hidden_size=32, which it does not divide: set mesh.fsdp=4",
        ),
        ({"tensor": 3}, "mesh.tensor=3 cuts model.num_attention_heads=8, which it does not divide: set mesh.tensor=1"),
        (
            {"tensor": 6, "changes": {"num_attention_heads": 12, "head_dim": 4}},
            "mesh.tensor=6 and model.num_key_value_heads=4, of which one must divide the other: set mesh.tensor=2",
        ),
        (
            {"tensor": 4, "changes": {"intermediate_size": 50}},
            "mesh.tensor=4 cuts model.intermediate_size=50, which it does not divide: set mesh.tensor=2",
        ),
        (
            {"tensor": 4, "changes": {"moe": dataclasses.replace(EXPERTS, intermediate_size=18)}},
            "mesh.tensor=4 cuts model.moe.intermediate_size=18, which it does not divide: set mesh.tensor=2",
        ),
        (
            {"tensor": 4, "changes": {"vocab_size": 61, "vocab_size_multiple": 6}},
            "mesh.tensor=4 cuts the vocabulary's rows=66, which it does not divide: set model.vocab_size_multiple=12",
        ),
        (
            {"expert": 2},
            "mesh.expert=2 cuts experts, and the model has none: set model.moe.num_experts, or "
            "mesh.fsdp=2 mesh.expert=1",
        ),
        (
            {"expert": 4, "changes": {"moe": EXPERTS}},
            "mesh.expert=4 cuts model.moe.num_experts=6, which it does not divide: set mesh.expert=2",
        ),
        (
            {"context": 4, "length": 20},
            "mesh.context=4 cuts rows into 8 chunks, which do not divide data.sequence_length=20: ",
        ),
        (
            {"context": 2, "changes": {"memory": MemoryConfig(length=4)}},
            "mesh.context=2 cuts rows by position, and segment memory reads rows as a whole: set model.memory.length="
            "0, or mesh.context=1",
        ),
        (
            {"context": 2, "changes": {"moe": dataclasses.replace(EXPERTS, gate="context", history_decay=0.5)}},
            "mesh.context=2 cuts rows by position, and gates read the history of a row in its order",
        ),
        (
            {"context": 2, "changes": {"moe": dataclasses.replace(EXPERTS, dispatch="capacity", overflow=("sticky",))}},
            "mesh.context=2 cuts rows by position, and the overflow step sticky reads the token before",
        ),
        (
            {"data": 8, "length": 4, "changes": {"moe": SCARCE}},  # on one device it would do
            "moe.capacity_factor 1 gives an expert room for 3 of 8 tokens, less than moe.num_experts_per_tok 4: raise",
        ),
        (
            {"data": 2, "context": 2, "length": 4, "changes": {"moe": SCARCE}, "rows": 4},
            "moe.capacity_factor 1 gives an expert room for 2 of 4 tokens",
        ),
        (
            {"context": 2, "changes": {"attention_dropout": 0.1}},
            "mesh.context=2 cuts rows by position, and no weights of attention are dropped there",
        ),
        (
            {"context": 2, "changes": {"attention_prune_below": 0.1}},
            "mesh.context=2 cuts rows by position, and no weights of attention are dropped there",
        ),
    ],
)
def test_what_an_axis_does_not_divide_is_told(settings, told):
    with pytest.raises(ConfigError) as error:
        checked(**settings)
    assert str(error.value).startswith(told)
    named = re.findall(r"mesh\.(\w+)=(\d+)", str(error.value).rpartition(": ")[2])
    if named:
        checked(**{**settings, **{axis: int(size) for axis, size in named}})  # as it says

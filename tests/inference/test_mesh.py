"""Texts of a network that is split over devices. On eight CPU devices."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from helpers.collectives import of_program
from helpers.grids import REPEATS
from helpers.variants import BASE, make_model

from stellarbyte_jax import generate, make_mesh, place_weights
from stellarbyte_jax.config import CacheConfig, MoEConfig
from stellarbyte_jax.inference import programs
from stellarbyte_jax.inference.request import Request

EXPERTS = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=16)
SMALL = dataclasses.replace(BASE, vocab_size=64, num_hidden_layers=2)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.mark.slow
def test_texts_are_those_of_one_device():
    """A dense layer and one with experts; several devices read one head of keys and values."""
    moe = dataclasses.replace(EXPERTS, first_k_dense_replace=1)
    model, params = make_model(dataclasses.replace(SMALL, moe=moe))
    expected = generate(model, params, PROMPTS, max_new_tokens=12)
    split = make_mesh({"expert": 2, "tensor": 4})
    placed = place_weights(model, params, split)
    query = placed["layers"]["0"]["attn"]["q"]
    assert query.sharding.shard_shape(query.shape)[2] == query.shape[2] // 4
    with jax.set_mesh(split):
        found = generate(model, placed, PROMPTS, max_new_tokens=12)
    assert [list(text) for text in found.sequences] == [list(text) for text in expected.sequences]


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1.0, "top_p": 0.9, "seed": 3}, id="sampled", marks=REPEATS),
    ],
)
def test_texts_whose_rows_tensor_splits_in_the_prefill_are_those_of_one_device(sampling):
    """As many prompts as devices: between layers each has one. A dense layer and one with experts."""
    moe = dataclasses.replace(EXPERTS, first_k_dense_replace=1)
    model, params = make_model(dataclasses.replace(SMALL, moe=moe))
    prompts = [[3 * row + column for column in range(1 + row % 5)] for row in range(8)]
    expected = generate(model, params, prompts, max_new_tokens=8, **sampling)
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        found = generate(model, place_weights(model, params, mesh), prompts, max_new_tokens=8, **sampling)
    assert [list(text) for text in found.sequences] == [list(text) for text in expected.sequences]


CACHES = {
    "full, ring and history": {
        "sliding_window": 4,
        "sink_tokens": 1,
        "layer_types": ("sliding_attention", "full_attention"),
        "moe": dataclasses.replace(EXPERTS, gate="context", history_decay=0.9),
    },
    "pruned, of 8 bits": {"cache": CacheConfig(heavy_hitters=4, recent=4, dtype="int8")},
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_lies_as_the_rules_say_before_and_after_each_block(kind, monkeypatch):
    """Rows over the data axes, heads over tensor; slots and channels whole."""
    model, params = make_model(dataclasses.replace(SMALL, **CACHES[kind]))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    seen = []

    def look(state):
        state.by_axes(lambda axes, x: seen.append((axes, x)) or x)

    decode = programs.decode_block

    def watched(model, params, decoding, *args, **kwargs):
        look(decoding.state)
        decoded = decode(model, params, decoding, *args, **kwargs)
        look(decoded[0].state)
        return decoded

    monkeypatch.setattr(programs, "decode_block", watched)
    with jax.set_mesh(mesh):
        generate(model, place_weights(model, params, mesh), [*PROMPTS, [4, 4]], max_new_tokens=12)
    cuts = {"batch": 4, "kv_heads": 2}
    assert {axis for axes, _ in seen for axis in axes} >= {"batch", "slots", "kv_heads", "head_dim"}
    for axes, x in seen:
        expected = tuple(size // cuts.get(axis, 1) for axis, size in zip(axes, x.shape, strict=True))
        assert x.sharding.shard_shape(x.shape) == expected, axes


def test_a_cache_of_fewer_heads_than_devices_is_whole_on_each():
    model, params = make_model(SMALL)
    mesh = make_mesh({"tensor": 4})
    placed = place_weights(model, params, mesh)
    with jax.set_mesh(mesh):
        _, state = programs.prefill(
            model, placed, np.ones((3, 8), np.int32), np.full(3, 8, np.int32), None, cache_length=16
        )
    keys = state.cache.groups[0][0].storage.keys
    assert keys.shape[3] == 2 and keys.sharding.shard_shape(keys.shape) == keys.shape


WRITTEN = {
    "full and ring": {"sliding_window": 4, "sink_tokens": 1, "layer_types": ("sliding_attention", "full_attention")},
    "8 bits": {"cache": CacheConfig(dtype="int8"), "num_hidden_layers": 1},
    "pruned, of 8 bits": {"cache": CacheConfig(heavy_hitters=4, recent=4, dtype="int8"), "num_hidden_layers": 1},
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_each_device_writes_and_reads_the_cache_of_its_rows(sizes, kind):
    """Programs that prefill and decode exchange nothing over data: no indices, keys, scores or marks of tokens."""
    model, params = make_model(dataclasses.replace(SMALL, **WRITTEN[kind]))
    mesh = make_mesh(sizes)
    placed = place_weights(model, params, mesh)
    lengths_B = np.full(8, 16, np.int32)
    request = Request.make(model.config, [[1]] * 8, max_new_tokens=4, repetition_penalty=1.5, log_probs=True)
    asked = request.keys_B, request.sampler, lengths_B, np.int32(0)
    with jax.set_mesh(mesh):
        prompts = placed, np.ones((8, 16), np.int32), lengths_B, None
        prefill = programs.prefill.lower(model, *prompts, cache_length=32).compile()
        logits_BV, state = prefill(*prompts)
        marks_BV, done_B = np.zeros(logits_BV.shape, bool), np.zeros(8, bool)
        decoding = programs.Decoding(state, logits_BV, marks_BV, done_B, np.int32(0))
        decode = programs.decode_block.lower(model, placed, decoding, *asked, steps=2, log_probs=True).compile()
    for program in (prefill, decode):
        found = set(of_program(program, mesh))
        if "tensor" not in sizes:
            assert not found
        else:
            assert found and found <= {(kind, "tensor") for kind in ("all-reduce", "all-gather", "reduce-scatter")}
            integers = re.findall(r" = s32\[([\d,]+)\]\S* all-gather", program.as_text())
            sizes_of = [math.prod(map(int, shape.split(","))) for shape in integers]
            assert all(size <= 4 * 16 for size in sizes_of), "positions of a device's tokens, and not of all slots"

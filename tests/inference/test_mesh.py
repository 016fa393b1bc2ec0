"""Texts of a network that is split over devices. On eight CPU devices."""

import dataclasses

import jax
import pytest
from helpers.variants import BASE, make_model

from stellarbyte_jax import generate, make_mesh, place_weights
from stellarbyte_jax.config import MoEConfig

EXPERTS = {"moe": MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=16)}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.mark.parametrize(("mesh", "changes"), [({"tensor": 4}, {}), ({"expert": 2, "tensor": 2}, EXPERTS)])
def test_texts_are_those_of_one_device(mesh, changes):
    model, params = make_model(dataclasses.replace(BASE, vocab_size=64, **changes))
    expected = generate(model, params, PROMPTS, max_new_tokens=12)
    split = make_mesh(mesh)
    placed = place_weights(model, params, split)
    query = placed["layers"]["0"]["attn"]["q"]
    assert query.sharding.shard_shape(query.shape)[2] == query.shape[2] // mesh["tensor"]
    with jax.set_mesh(split):
        found = generate(model, placed, PROMPTS, max_new_tokens=12)
    assert [list(text) for text in found.sequences] == [list(text) for text in expected.sequences]

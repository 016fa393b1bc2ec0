"""A token through models whose attention over the cache is the kernel, in jax's interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow

from stellarbyte_jax.config import ByteConfig, CacheConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward, forward_step, init_params
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.ops.attention import decode_pallas
from stellarbyte_jax.ops.pallas import compat

BASE = ByteConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    intermediate_size=64,
    max_position_embeddings=256,
)
WINDOWS = {
    "num_hidden_layers": 4,
    "sliding_window": 66,
    "sink_tokens": 2,
    "layer_types": ("sliding_attention", "full_attention") * 2,
}
CASES = {
    "full": {},
    "int8, soft cap": {"cache": CacheConfig(dtype="int8"), "attention_logit_softcap": 5.0},
    "float8, a window gone round, sinks": {"cache": CacheConfig(dtype="float8_e4m3fn"), **WINDOWS},
    "a window gone round": {"sliding_window": 64},
    "keys that change after they are stored": {"position_embedding": "xpos"},
}
LENGTHS = (100, 5)
steps = jax.jit(forward_step, static_argnums=0)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 lacks transposed matrices")
@pytest.mark.parametrize(
    "name", mostly_slow(CASES, "float8, a window gone round, sinks", "keys that change after they are stored")
)
def test_logits_are_those_of_the_reference(name, monkeypatch):
    model = ByteTransformer(dataclasses.replace(BASE, **CASES[name]))
    kernel = ByteTransformer(dataclasses.replace(model.config, attention_implementation="pallas"))
    params = jax.jit(lambda: init_params(model, jax.random.key(1)))()
    tokens = np.random.default_rng(2).integers(0, 64, (2, 101), dtype=np.int32)
    state = State(make_cache(model.config, 2, 128))
    prefill = jax.jit(lambda params, inputs, state: forward(model, params, inputs, state).state)
    state = prefill(params, Inputs(tokens[:, :100], lengths_B=np.asarray(LENGTHS, np.int32)), state)
    given = []
    right = decode_pallas.decode_attention

    def spied(q_BTNH, stored, *rest):
        given.append((stored.keys.shape, stored.dtype, stored.ends_B is not None))
        return right(q_BTNH, stored, *rest)

    monkeypatch.setattr(decode_pallas, "decode_attention", spied)
    expected, _ = steps(model, params, tokens[:, 100], state)
    with compat.interpreted():
        found, _ = steps(kernel, params, tokens[:, 100], state)
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    in_place = CASES[name].get("position_embedding") is None
    dtype = CASES[name].get("cache", CacheConfig()).dtype
    assert given
    for shape, held, ends in given:
        assert shape[0] == (2 if in_place else 1)
        assert held == ("bfloat16" if dtype == "compute" or not in_place else dtype) and ends == in_place


def test_ends_of_rows_are_those_of_their_slots():
    config = dataclasses.replace(BASE, compute_dtype="float32", **WINDOWS)
    cache = make_cache(config, 3, 128)
    begun, _ = cache.begin(jnp.arange(100)[None] < jnp.asarray([[100], [1], [0]]), None)
    ((ring, full),) = begun.groups
    assert list(full.ends_B) == [100, 1, 0] and list(ring.ends_B) == [68, 1, 0]
    ended = begun.end(begun.groups, jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool))
    assert all(place.ends_B is None for place in ended.groups[0])

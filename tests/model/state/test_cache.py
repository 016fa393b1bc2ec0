"""The cache of a whole model: which kind each layer has, and that a step updates it in place."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from helpers.variants import BASE, init, run_on, some_tokens

from stellarbyte_jax.config import CacheConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward_step, param_shapes
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.full import FullCache
from stellarbyte_jax.model.state.layer_cache import LayerCache
from stellarbyte_jax.model.state.memory import Memory
from stellarbyte_jax.model.state.pruned import PrunedCache
from stellarbyte_jax.model.state.ring import RingCache

MIXED = {"sliding_window": 40, "layer_types": ("sliding_attention", "full_attention") * 2}
DTYPES = ["float32", "bfloat16", "int8", "float8_e4m3fn"]


def test_windowed_layers_have_a_ring_the_others_room_for_every_token():
    config = dataclasses.replace(BASE, sink_tokens=2, **MIXED)
    ((ring, full),) = make_cache(config, 3, 64).groups
    assert (type(ring), type(full)) == (RingCache, FullCache)
    assert ring.storage.keys.shape == (2, 3, 42, 2, 8)  # layers of the place, rows, window and sinks, heads, channels
    assert full.storage.keys.shape == (2, 3, 64, 2, 8)
    ((short, _),) = make_cache(config, 3, 16).groups
    assert short.storage.slots == 18  # a ring holds no more than the text
    config = dataclasses.replace(BASE, memory={"length": (8, 8, 4, 4), "recent_share": 0.75})
    rings = make_cache(config, 1, 64).groups[0]
    assert [x.storage.slots for x in rings] == [2 + 7, 2 + 7, 1 + 4, 1 + 4]  # compressed slots, and the window
    pruned = make_cache(dataclasses.replace(BASE, cache=CacheConfig(heavy_hitters=5, recent=3), **MIXED), 1, 64)
    for place in pruned.groups[0]:
        assert (type(place), place.storage.slots) == (PrunedCache, 8)
        assert place.needs_weights and not full.needs_weights
    for place in (ring, full, *pruned.groups[0]):
        assert isinstance(place, LayerCache)


def test_bytes_are_those_of_keys_values_and_scales():
    sizes = {}
    for dtype in DTYPES:
        cache = make_cache(dataclasses.replace(BASE, cache=CacheConfig(dtype=dtype)), 2, 16)
        sizes[dtype] = cache.nbytes / (2 * 4 * 2 * 16 * 2)  # keys and values, layers, rows, slots, heads
    assert sizes == {"float32": 32, "bfloat16": 16, "int8": 8 + 4, "float8_e4m3fn": 8 + 4}


def test_a_call_leaves_nothing_of_itself_behind():
    """So that states of different calls are one type to jax.jit."""
    model = ByteTransformer(dataclasses.replace(BASE, **MIXED))
    cache = make_cache(model.config, 1, 16)
    assert cache.fresh
    states = []
    for tokens in (some_tokens(1, 5), some_tokens(1, 1), some_tokens(1, 3)):
        _, state = run_on(model, init(model), tokens, cache=cache)
        cache = state.cache
        states.append(jax.tree.structure(cache))
        assert not cache.fresh
        assert all(place.new is None for place in cache.groups[0])
    assert len(set(states)) == 1
    assert cache.lengths_B.tolist() == [9]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decode_step_copies_no_cache(dtype):
    """In the compiled loops over tokens and layers nothing but the update itself has the size of the cache."""
    config = dataclasses.replace(BASE, cache=CacheConfig(dtype=dtype), **MIXED)
    model = ByteTransformer(config)
    _, state = jax.eval_shape(
        lambda params: run_on(model, params, some_tokens(2, 4), cache=make_cache(config, 2, 96)), param_shapes(model)
    )

    def decode(params, state, tokens_B):
        def body(carry, _):
            tokens_B, state = carry
            logits_BV, state = forward_step(model, params, tokens_B, state)
            return (jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), state), None

        return jax.lax.scan(body, (tokens_B, state), None, length=16)[0]

    tokens_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = (
        jax.jit(decode, donate_argnums=1).lower(param_shapes(model), State(state.cache), tokens_B).compile().as_text()
    )
    sizes = {place.storage.keys.shape for place in state.cache.groups[0]}
    assert sizes == {(2, 2, 40, 2, 8), (2, 2, 96, 2, 8)}
    for size in sizes:
        found = re.findall(rf"= \w+\[{','.join(map(str, size))}\]\S* ([\w-]+)\(", text)
        # A fusion's own instructions are in the text too.
        assert set(found) <= {"parameter", "get-tuple-element", "bitcast", "fusion", "scatter", "dynamic-update-slice"}
        assert "scatter" in found or "dynamic-update-slice" in found


def test_rows_that_are_not_there_cannot_be_selected():
    config = dataclasses.replace(BASE, memory={"length": 3})
    for state in (make_cache(BASE, 2, 8), Memory.create(config, 2)):
        for row in (2, -1):
            with pytest.raises(ValueError, match=f"there is no row {row}: the rows are 0 to 1"):
                state.select([0, row])
        assert jax.jit(lambda state, rows: state.select(rows))(state, jnp.asarray([1])).batch_size == 1

"""The slot of a token is its position; padding is not stored, and rows are taken and emptied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.model.state.full import FullCache
from stellarbyte_jax.model.state.layer_cache import NewTokens
from stellarbyte_jax.model.state.storage import Storage


def empty(rows=2, slots=6):
    storage = Storage.empty((3, rows, slots, 1, 2), "float32")
    return FullCache(storage, jnp.full((rows, slots), -1, jnp.int32), jnp.asarray(1, jnp.int32))


def tokens(*values):
    return jax.device_put(np.asarray(values, np.float32))[:, :, None, None] * jnp.ones((1, 1, 1, 2))


def appended(cache, positions, valid, *values):
    begun = cache.begin(
        NewTokens(jax.device_put(np.asarray(positions, np.int32)), jax.device_put(np.asarray(valid, bool)))
    )
    cache, found = begun.append(tokens(*values), -tokens(*values))
    return cache.end(), found


def test_a_token_lies_at_its_position_in_the_current_layer_and_padding_nowhere():
    cache, found = appended(empty(), [[0, 1, 2], [0, 1, 2]], [[1, 1, 1], [1, 0, 0]], [5, 6, 7], [8, 9, 9])
    np.testing.assert_array_equal(cache.positions_BS, [[0, 1, 2, -1, -1, -1], [0, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(cache.storage.keys[1, :, :, 0, 0], [[5, 6, 7, 0, 0, 0], [8, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(cache.storage.values, -cache.storage.keys)
    assert not np.any(cache.storage.keys[0]) and not np.any(cache.storage.keys[2])
    assert found.aligned and found.valid_BS is None  # the first tokens see each other, and padding stands behind them
    cache, found = appended(cache, [[3], [1]], [[1], [1]], [10], [11])
    assert not found.aligned
    np.testing.assert_array_equal(found.positions_BSK[..., 0], [[0, 1, 2, 3, -1, -1], [0, 1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(found.keys_BSKH[:, :, 0, 0], [[5, 6, 7, 10, 0, 0], [8, 11, 0, 0, 0, 0]])


def test_empty_memory_slots_of_a_first_call_are_seen_by_nobody():
    new = NewTokens(jax.device_put(np.asarray([[0, 1, 2, 3]], np.int32)), jnp.asarray([[False, True, True, False]]), 2)
    _, found = empty(rows=1).begin(new).append(tokens([1, 2, 3, 4]), tokens([1, 2, 3, 4]))
    np.testing.assert_array_equal(found.valid_BS, [[False, True, True, True]])


def test_more_tokens_than_slots_are_refused():
    with pytest.raises(ValueError, match="7 tokens do not fit into a cache of 6 slots: make a longer cache"):
        appended(empty(rows=1), [range(7)], [[1] * 7], range(7))


def test_rows_are_taken_and_emptied():
    cache, _ = appended(empty(), [[0, 1], [0, 1]], [[1, 1], [1, 0]], [5, 6], [8, 9])
    taken = cache.select(jax.device_put(np.asarray([1, 1, 0], np.int32)))
    np.testing.assert_array_equal(taken.positions_BS[:, :2], [[0, -1], [0, -1], [0, 1]])
    np.testing.assert_array_equal(taken.storage.keys[1, :, 0, 0, 0], [8, 8, 5])
    emptied = taken.reset(jnp.asarray([True, False, False]))
    np.testing.assert_array_equal(emptied.positions_BS[:, 0], [-1, 0, 0])
    assert not cache.needs_weights and cache.accumulate(None) is cache

"""The ring of windowed layers: what it keeps, and where."""

import jax.numpy as jnp
import numpy as np
from helpers.variants import make

from stellarbyte_jax.model.state.cache import make_cache


def test_no_two_tokens_of_a_call_are_written_to_one_slot():
    """More tokens than a ring has slots, ragged rows, sinks: only the newest, the sinks, and never padding."""
    config = make("windows, sinks, pruned weights, cap")[0].config
    cache = make_cache(config, 2, 30)
    valid_BT = jnp.arange(13)[None] < jnp.asarray([[13], [7]])
    begun, positions_BT = cache.begin(valid_BT, None)
    np.testing.assert_array_equal(positions_BT, np.broadcast_to(np.arange(13), (2, 13)))
    ((ring, full),) = begun.groups
    for row, length in enumerate((13, 7)):
        stored = [s for s in np.asarray(ring.write_indices_BT[row]) if s < 6]  # four of the window, two sinks
        assert len(set(stored)) == len(stored) == 6
        held = sorted(np.asarray(ring.positions_BS[row]).tolist())
        assert held == [0, 1, *range(length - 4, length)]
        assert np.asarray(full.write_indices_BT[row][:length]).tolist() == list(range(length))
        assert np.all(np.asarray(full.write_indices_BT[row][length:]) >= 30)
        every = np.asarray(ring.write_indices_BT[row])
        assert len(set(every.tolist())) == 13  # unique_indices is promised to XLA


def test_several_new_tokens_see_what_the_ring_loses_to_them():
    """Keys are the ring as it was, and the new ones behind it; one new token sees the ring with itself in it."""
    config = make("window")[0].config  # five tokens
    cache = make_cache(config, 1, 30)
    keys = jnp.arange(12, dtype=jnp.float32)[None, :, None, None] * jnp.ones((1, 12, 2, 8))

    def call(cache, at, T):
        begun, _ = cache.begin(jnp.ones((1, T), bool), None)
        ((ring,),) = begun.groups
        ring, kv = ring.at(jnp.asarray(0)).append(keys[:, at : at + T], keys[:, at : at + T])
        return cache.end(((ring,),), jnp.arange(at, at + T, dtype=jnp.int32)[None], jnp.ones((1, T), bool)), kv

    cache, kv = call(cache, 0, 7)
    assert kv.aligned
    cache, kv = call(cache, 7, 3)
    assert sorted(kv.positions_BSK[0, :, 0].tolist()) == [2, 3, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(kv.keys_BSKH[0, :, 0, 0], kv.positions_BSK[0, :, 0])
    cache, kv = call(cache, 10, 1)
    assert sorted(kv.positions_BSK[0, :, 0].tolist()) == [6, 7, 8, 9, 10]
    np.testing.assert_array_equal(kv.keys_BSKH[0, :, 0, 0], kv.positions_BSK[0, :, 0])

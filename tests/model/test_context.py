"""What the tokens of a call see of each other, and of a memory before them."""

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.config import LayerSpec
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.state.memory import LayerMemory
from stellarbyte_jax.ops.rotary import Frequencies


def context(positions, segments=None, max_segments=None):
    T = positions.shape[1]
    rows = jnp.arange(T, dtype=jnp.int32)[None]
    return LayerContext(positions, rows, segments, Frequencies(jnp.ones(4)), max_segments)


def test_a_document_starts_at_position_0_or_where_another_one_ends():
    """The first one of a row may go on from before; the second's beginning may be cut off."""
    positions = jax.device_put(np.asarray([[3, 4, 7, 8, 0, 1]], np.int32))
    assert context(positions, jax.device_put(np.asarray([[1, 1, 2, 2, 3, 3]], np.int32))).starts.tolist() == [
        [0, 0, 1, 0, 1, 0]
    ]
    assert context(positions).starts.tolist() == [[0, 0, 0, 0, 1, 0]]


def test_the_mask_of_a_row_counts_places_and_shows_the_first_tokens_of_each_document():
    positions = jax.device_put(np.asarray([[0, 1, 2, 0, 1, 2]], np.int32))
    ids = jax.device_put(np.asarray([[1, 1, 1, 2, 2, 2]], np.int32))
    mask = context(positions, ids, 3).mask(LayerSpec(2), None, sink_tokens=1)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    np.testing.assert_array_equal(mask.allowed()[0, 0], np.asarray(expected, bool))
    assert (mask.max_segments, mask.aligned, mask.window) == (3, True, 2)
    assert context(positions, ids).mask(LayerSpec(None), None, sink_tokens=1).always_visible_BSK is None


def test_the_mask_behind_a_memory_shows_valid_slots_to_the_first_document_alone():
    """Two compressed slots, which every token sees, and two recent ones within the window; one of each is empty."""
    memory = LayerMemory(jnp.zeros((1, 4, 32)), jnp.asarray([[False, True, False, True]]))
    positions = jax.device_put(np.asarray([[7, 8, 9, 0]], np.int32))
    ids = jax.device_put(np.asarray([[1, 1, 1, 2]], np.int32))
    mask = context(positions, ids, 2).mask(LayerSpec(3, 2, 2), memory, sink_tokens=0)
    expected = [[0, 1, 0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask.allowed()[0, 0], np.asarray(expected, bool))
    assert mask.max_segments == 2
    alone = context(positions).mask(LayerSpec(3, 2, 2), memory, sink_tokens=0)
    np.testing.assert_array_equal(alone.allowed()[0, 0, :3], np.asarray(expected, bool)[:3])
    assert alone.max_segments is None and alone.k_segments_BS is None

"""Which rows tiles of a grouped product read and write."""

import jax
import numpy as np
import pytest
from helpers.grouped import loads

from stellarbyte_jax.ops.pallas.group_tiles import HALF, ROWS, by_size, row_tiles


@pytest.mark.parametrize("load", loads(9, 1500))
@pytest.mark.parametrize("rows", [1500, 1471])
def test_every_row_is_written_by_its_group_and_by_no_other(load, rows):
    sizes = loads(9, rows)[load]
    owner = np.repeat(np.arange(10), [*sizes, rows - sizes.sum()])
    table, count = jax.jit(row_tiles, static_argnums=1)(jax.device_put(np.asarray(sizes, np.int32)), rows)
    groups, first0, first1, written0, written1 = np.asarray(table)[:, : int(count[0])]
    written = np.zeros(rows, int)
    for group, firsts, counts in zip(
        groups, np.stack([first0, first1], 1), np.stack([written0, written1], 1), strict=True
    ):
        for first, part in zip(firsts, counts, strict=True):
            assert 0 <= first < rows and 0 <= part <= HALF
            assert part in (0, HALF) or np.sum(owner == group) < HALF
            assert np.all(owner[first : first + part] == group)
            assert first + part <= rows
            written[first : first + part] += 1
    assert np.all(written > 0)
    full = sum(np.sum(owner == g) // HALF * HALF for g in range(10))
    assert np.sum(written) - rows <= 10 * HALF and full <= rows
    expected = sum(-(-size // ROWS) for size in [*sizes, rows - sizes.sum()])
    assert int(count[0]) == expected <= table.shape[1]


def test_groups_are_sorted_by_size_the_earlier_first_of_equal_ones():
    table, _ = jax.jit(by_size, static_argnums=(1, 2))(jax.device_put(np.asarray([3, 0, 7, 3, 5], np.int32)), 4, 4)
    np.testing.assert_array_equal(table, [[2, 4, 0, 3, 1], [3, 13, 0, 10, 3], [7, 5, 3, 3, 0]])


@pytest.mark.parametrize(
    ("sizes", "tiles", "blocks", "first"),
    [
        # A tile of the largest group takes 18 steps, one of the others 6; the block without one has time for 3.
        ([4 * 64, 16 * 64, 4 * 64], 3, 4, 3),
        ([19 * 64, 8 * 64, 4 * 64, 0], 6, 8, 4),  # 21 steps, others 10: two for each of the two blocks without
        ([128 * 64, 8 * 64, 4 * 64, 0], 6, 8, 18),  # all of them
        ([256, 256, 256], 4, 4, 0),  # all have as many
        ([256, 256, 256], 5, 4, 3),
    ],
)
def test_blocks_without_a_tile_of_the_largest_group_begin_with_others(sizes, tiles, blocks, first):
    found = jax.jit(by_size, static_argnums=(1, 2))(jax.device_put(np.asarray(sizes, np.int32)), tiles, blocks).first_1
    assert int(found[0]) == first

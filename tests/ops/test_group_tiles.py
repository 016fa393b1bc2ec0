"""Which rows tiles of a grouped product read and write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grouped import loads

from stellarbyte_jax.ops.pallas.group_tiles import HALF, ROWS, first_place, largest_group, place_of, windows
from stellarbyte_jax.ops.pallas.ring import first_column, widths


def all_tiles(sizes, rows, stride):
    """Group, first rows and written rows of each tile, as ``stride`` blocks find them that begin at the first ones."""

    @jax.jit
    def walk(sizes, first):
        def step(place, tile):
            place = place_of(tile, place, sizes, rows)
            return place, (place.group, *windows(tile, place))

        most = rows // ROWS + len(sizes) + 2
        return jax.lax.scan(step, first_place(sizes), first + stride * jnp.arange(most // stride + 2))[1]

    found = {}
    for first in range(stride):
        groups, firsts, written = walk(jax.device_put(np.asarray(sizes, np.int32)), jnp.int32(first))
        for turn, group in enumerate(np.asarray(groups)):
            if group <= len(sizes):
                found[first + stride * turn] = (
                    int(group),
                    [int(each[turn]) for each in firsts],
                    [int(each[turn]) for each in written],
                )
    return [found[tile] for tile in range(len(found))]


@pytest.mark.parametrize("load", loads(9, 1500))
@pytest.mark.parametrize("rows", [1500, 1471])
@pytest.mark.parametrize("stride", [1, 3])
def test_every_row_is_written_by_its_group_and_by_no_other(load, rows, stride):
    sizes = loads(9, rows)[load]
    owner = np.repeat(np.arange(10), [*sizes, rows - sizes.sum()])
    tiles = all_tiles(sizes, rows, stride)
    written = np.zeros(rows, int)
    for group, firsts, counts in tiles:
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
    assert len(tiles) == expected


@pytest.mark.parametrize(
    ("sizes", "tiles", "blocks", "ahead"),
    [
        # A tile of the largest group takes 18 steps, one of the others 6; the block without one has time for 3.
        ([4 * 64, 16 * 64, 4 * 64], 3, 4, 3),
        ([4 * 64, 0, 19 * 64, 8 * 64], 6, 8, 8),  # 21 steps: three of 6 and one of 2 for both without
        ([128 * 64, 8 * 64, 4 * 64, 0], 6, 8, 18),  # all of them
        ([256, 256, 256], 4, 4, 0),  # all have as many
        ([256, 256, 256], 5, 4, 3),
        ([0, 0], 5, 4, 3),
    ],
)
def test_blocks_without_a_tile_of_the_largest_group_begin_with_others(sizes, tiles, blocks, ahead):
    found = jax.jit(largest_group, static_argnums=(1, 2))(jax.device_put(np.asarray(sizes, np.int32)), tiles, blocks)
    largest = int(np.argmax(sizes))
    assert [int(each) for each in found] == [largest, sum(sizes[:largest]), sizes[largest], ahead, sum(sizes)]


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_tiles_cover_the_columns_once_and_the_narrow_ones_are_about_even(width):
    for columns in range(64, 1601, 64):
        tiles, last = -(-columns // width), widths(columns, width)
        cut = [width] * (tiles - len(last)) + last
        assert sum(cut) == columns
        assert all(0 < each <= width and each % 64 == 0 for each in cut)
        assert len(last) < 2 or last[0] - last[1] in (0, 64)
        firsts = [int(first_column(jnp.int32(tile), columns, width)) for tile in range(tiles)]
        assert firsts == np.cumsum([0, *cut[:-1]]).tolist()

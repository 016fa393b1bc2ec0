"""Which rows and which group each tile of a grouped matrix product has, computed once before the kernel.

S rows, E groups, T tiles. All of it is sums over comparisons: XLA makes a few small kernels of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

ROWS = 128  # of a tile
HALF = 64  # of each of the two warpgroups that compute it


class RowTiles(NamedTuple):
    """Tiles of 128 rows that cover all rows, group by group, and then those behind the last group.

    Attributes:
      table_5T: int32: the group, E behind the last one; for each half of the tile the first row of its window of 64;
        for each half how many rows of its window are to be written, from the first one on; 0 for a half without rows.
      count_1: int32, tiles that there are; those behind them in the table mean nothing.
    """

    table_5T: Array
    count_1: Array


def row_tiles(sizes_E: Int[Array, " E"], rows: int) -> RowTiles:
    """Tiles begin where groups begin, so that all but the last one of a group are full.

    The windows of a group's last tile are moved back until they end where the group ends, over rows that are computed
    twice then, bit for bit the same: only in groups of fewer than 64 rows must a part of a window not be written.
    """
    E = sizes_E.shape[0]
    sizes_E = sizes_E.astype(jnp.int32)
    sizes_G = jnp.append(sizes_E, rows - jnp.sum(sizes_E, dtype=jnp.int32))
    tiles_G = -(-sizes_G // ROWS)
    starts_G, tile_starts_G = _before(sizes_G), _before(tiles_G)
    tiles_T = jnp.arange(rows // ROWS + E + 1, dtype=jnp.int32)
    group_T = jnp.sum(tile_starts_G[None] + tiles_G[None] <= tiles_T[:, None], axis=1, dtype=jnp.int32)
    group_T = jnp.minimum(group_T, E)
    size_T, start_T = sizes_G[group_T], starts_G[group_T]
    end_T = start_T + size_T
    first_T = start_T + ROWS * (tiles_T - tile_starts_G[group_T])
    firsts, written = [], []
    for half in range(2):
        begin_T = first_T + HALF * half
        left_T = jnp.clip(end_T - begin_T, 0, HALF)
        move_T = (left_T > 0) & (size_T >= HALF)
        # What an empty half loads is not used: the rows of the other one are at hand.
        stay_T = jnp.where(left_T > 0, begin_T, firsts[0] if half else first_T)
        firsts.append(jnp.where(move_T, jnp.minimum(begin_T, end_T - HALF), stay_T))
        written.append(jnp.where(move_T, HALF, left_T))
    return RowTiles(jnp.stack([group_T, *firsts, *written]), jnp.sum(tiles_G, dtype=jnp.int32)[None])


class BySize(NamedTuple):
    """Groups from the largest to the smallest.

    Attributes:
      table_3E: int32: the group, its first row and its size.
      first_1: int32, of the tiles behind those of the largest group, how many are as much work for the blocks that have
        one tile less of the largest group as this tile is for the others.
    """

    table_3E: Array
    first_1: Array


def by_size(sizes_E: Int[Array, " E"], tiles: int, blocks: int) -> BySize:
    """Work of very different lengths ends at about the same time in all blocks when the longest is begun first.

    Args:
      sizes_E: rows of each group, which are summed over in the tiles of its result.
      tiles: of each group's result.
      blocks: that share them.
    """
    E = sizes_E.shape[0]
    sizes_E = sizes_E.astype(jnp.int32)
    numbers_E = jnp.arange(E, dtype=jnp.int32)
    larger_EE = sizes_E[None, :] > sizes_E[:, None]
    before_EE = larger_EE | ((sizes_E[None, :] == sizes_E[:, None]) & (numbers_E[None, :] < numbers_E[:, None]))
    ranks_E = jnp.sum(before_EE, axis=1, dtype=jnp.int32)
    table_3E = jnp.stack([numbers_E, _before(sizes_E), sizes_E])
    table_3E = jnp.zeros_like(table_3E).at[:, ranks_E].set(table_3E, unique_indices=True)
    # In units of a step and what begins and ends a tile: about as long as two steps.
    costs_E = (-(-table_3E[2] // HALF) + 2).astype(jnp.float32)
    free = -tiles % blocks
    budget = costs_E[0] * free / tiles  # for a tile of each smaller group
    rest_E = costs_E.at[0].set(0)
    before_E = jnp.sum(jnp.where(numbers_E[None, :] < numbers_E[:, None], rest_E[None, :], 0), axis=1)
    whole = jnp.sum(jnp.where(numbers_E > 0, jnp.clip((budget - before_E) / costs_E, 0, 1), 0)) * tiles
    first = whole.astype(jnp.int32) // max(free, 1) * free
    return BySize(table_3E, first[None])


def _before(counts_G: Array) -> Array:
    """The sum of the counts before each one."""
    numbers_G = jnp.arange(counts_G.size, dtype=jnp.int32)
    earlier_GG = numbers_G[None, :] < numbers_G[:, None]
    return jnp.sum(jnp.where(earlier_GG, counts_G[None, :], 0), axis=1, dtype=jnp.int32)

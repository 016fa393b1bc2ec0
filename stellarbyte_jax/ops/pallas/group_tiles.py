"""Which rows and which group each tile of a grouped matrix product has, found while a kernel goes through its tiles.

S rows, E groups. Sizes of groups are an array, or a reference to one in global memory. Numbers are int32.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

ROWS = 128  # of a tile
HALF = 64  # of each half, which one product of tensor cores makes


class Place(NamedTuple):
    """A group on the way through all of them.

    Attributes:
      group: its number; E for the rows behind the last one, and E + 1 behind these.
      tiles: of rows before it.
      first: its first row.
      size: its rows.
    """

    group: Array
    tiles: Array
    first: Array
    size: Array


def first_place(sizes_E: Any) -> Place:
    """The first group."""
    zero = jnp.int32(0)
    return Place(zero, zero, zero, sizes_E[0])


def place_of(tile: Array, place: Place, sizes_E: Any, rows: int) -> Place:
    """The group of a tile.

    Tiles begin where groups begin, so that all but the last one of a group are full.

    Args:
      tile: its number among the tiles of rows.
      place: of a tile before it, or of itself.
      sizes_E: rows of each group, at most ``rows`` in all.
      rows: in all.
    """
    E = sizes_E.shape[0]

    def tiles(size: Array) -> Array:
        return lax.div(size + (ROWS - 1), jnp.int32(ROWS))

    def is_before(place: Place) -> Array:
        return (place.group <= E) & (tile >= place.tiles + tiles(place.size))

    def next_place(place: Place) -> Place:
        group, first = place.group + 1, place.first + place.size
        size = sizes_E[jnp.minimum(group, E - 1)]
        return Place(group, place.tiles + tiles(place.size), first, jnp.where(group < E, size, rows - first))

    return lax.while_loop(is_before, next_place, place)


class Windows(NamedTuple):
    """Rows of the two halves of a tile.

    Attributes:
      firsts: the first row of each half's window of 64.
      written: how many rows of each window are to be written, from the first one on; 0 for a half without rows.
    """

    firsts: tuple[Array, Array]
    written: tuple[Array, Array]


def windows(tile: Array, place: Place) -> Windows:
    """The windows of a group's last tile are moved back until they end where the group ends.

    They lie over rows that are computed twice then, bit for bit the same: only in groups of fewer than 64 rows must a
    part of a window not be written.

    Args:
      tile: its number among the tiles of rows.
      place: of its group.
    """
    first, end = place.first + ROWS * (tile - place.tiles), place.first + place.size
    firsts, written = [], []
    for half in range(2):
        begin = first + HALF * half
        left = jnp.clip(end - begin, 0, HALF)
        is_moved = (left > 0) & (place.size >= HALF)
        # What an empty half loads is not used: the rows of the other one are at hand.
        stay = jnp.where(left > 0, begin, firsts[0] if half else place.first)
        firsts.append(jnp.where(is_moved, jnp.minimum(begin, end - HALF), stay))
        written.append(jnp.where(is_moved, jnp.int32(HALF), left))
    return Windows((firsts[0], firsts[1]), (written[0], written[1]))


class Largest(NamedTuple):
    """The group with the most rows, the first one of these.

    Attributes:
      group: its number.
      first: its first row.
      size: its rows.
      ahead: of the tiles behind those of the largest group, how many are as much work for the blocks that have one tile
        less of the largest group as this tile is for the others.
      rows: of all groups.
    """

    group: Array
    first: Array
    size: Array
    ahead: Array
    rows: Array


def largest_group(sizes_E: Any, tiles: int, blocks: int) -> Largest:
    """Work of very different lengths ends at about the same time in all blocks when the longest is begun first.

    Args:
      sizes_E: rows of each group, which are summed over in the tiles of its result.
      tiles: of each group's result.
      blocks: that share them.
    """
    E, zero = sizes_E.shape[0], jnp.int32(0)

    def compare(group: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        size, (largest, first, most, before) = sizes_E[group], found
        is_larger = size > most
        largest, first, most = (jnp.where(is_larger, *of) for of in ((group, largest), (before, first), (size, most)))
        return largest, first, most, before + size

    largest, first, most, rows = lax.fori_loop(zero, jnp.int32(E), compare, (zero, zero, jnp.int32(-1), zero))
    free = -tiles % blocks
    if free == 0:
        return Largest(largest, first, most, zero, rows)

    def cost(size: Array) -> Array:
        # In units of a step and what begins and ends a tile: about as long as two steps.
        return (lax.div(size + (HALF - 1), jnp.int32(HALF)) + 2).astype(jnp.float32)

    budget = cost(most) * (free / tiles)  # for a tile of each other group

    def spend(group: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        left, whole = found
        own = jnp.where(group == largest, jnp.float32(0), cost(sizes_E[group]))
        share = jnp.clip(left / jnp.maximum(own, jnp.float32(1)), 0.0, 1.0)
        return left - own, whole + jnp.where(group == largest, jnp.float32(0), share)

    _, whole = lax.fori_loop(zero, jnp.int32(E), spend, (budget, jnp.float32(0)))
    ahead = lax.div((whole * tiles).astype(jnp.int32), jnp.int32(free)) * free
    return Largest(largest, first, most, ahead, rows)

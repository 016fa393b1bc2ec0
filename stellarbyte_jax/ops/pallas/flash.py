"""What the kernels of attention and of its gradients share. H head size."""

import math
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.seen_keys import PINNED, Seen

HIDDEN = -1e30  # a score of a key that a query does not see; finite, as differences of two are
LOG2E = math.log2(math.e)


class Visible:
    """Which of a tile's scores count; queries are rows, keys columns."""

    def __init__(self, seen: Seen, vectors: Any, batch: Array, rows: Any, query: Array, shape: tuple[int, int]) -> None:
        """Reads what is said of the queries.

        Args:
          seen: what sees what.
          vectors: int32, for each query its first key; where keys are of several kinds, also the first key of its
            document, and the kind of each key.
          batch: number of the row.
          rows: of the queries.
          query: where the first one stands among the keys.
          shape: of tiles.
        """
        self._kinds = vectors[2].at[batch] if len(vectors) > 1 else None
        self._firsts = [compat.load_by_row(each.at[batch], rows) for each in vectors[:2]]
        self._query, self._shape, self._most = query, shape, seen.most

    def mask(self, key: Array) -> Array:
        """For a tile that begins with a key."""
        keys = compat.column_numbers(self._shape) + key
        queries = up_to(self._most, compat.row_numbers(self._shape) + self._query)
        kinds = None
        if self._kinds is not None:
            kinds = compat.load_by_column(self._kinds, pl.ds(key, self._shape[1]))
            kinds = lax.broadcast_in_dim(kinds, self._shape, (1,))
        return are_seen(keys, queries, [lax.broadcast_in_dim(x, self._shape, (0,)) for x in self._firsts], kinds)


def up_to(most: int | None, queries: Array) -> Array:
    """Where queries stand among the keys; behind the last one ``most``, if that is said."""
    return queries if most is None else jnp.minimum(queries, most)


def are_seen(keys: Array, queries: Array, firsts: list[Array], kinds: Array | None) -> Array:
    """Which keys queries see: see :class:`seen_keys.Seen`.

    Args:
      keys: their numbers.
      queries: where they stand among the keys.
      firsts: of each query the first key; with ``kinds`` the first of its document too.
      kinds: of keys.
    """
    seen = keys >= firsts[0]
    if kinds is not None:
        seen = (seen & (kinds > 0)) | ((kinds == PINNED) & (keys >= firsts[1]))
    return seen & (keys <= queries)


def capped(scores: Array, scale: float, softcap: float) -> tuple[Array, Array]:
    """Scores from products, within a soft cap, and the slope of that: 1 - tanh^2."""
    grown = jnp.exp2(scores * (2 * LOG2E * scale / softcap))
    bent = 1 - 2 / (1 + grown)  # the device's own tanh has 11 bits
    return softcap * bent, 1 - bent * bent


def in_three(step: Callable[[Array, Any, bool], Any], carried: Any, bounds: tuple[Array, Array, Array, Array]) -> Any:
    """Steps that need a mask, that need none, and that need one.

    Args:
      step: gets its number, what is carried, and whether it needs a mask; returns what is carried.
      carried: at first.
      bounds: of the three parts.
    """
    for number, is_masked in enumerate((True, False, True)):
        carried = lax.fori_loop(
            bounds[number], bounds[number + 1], lambda k, c, is_masked=is_masked: step(k, c, is_masked), carried
        )
    return carried


def whole_steps(
    seen: Seen, most: Array, query: Array, first: Array, pins: Array, steps: Array, tile: int
) -> tuple[Array, Array, Array, Array]:
    """Bounds for :func:`in_three`, of 64 queries through tiles of keys.

    Args:
      seen: what sees what.
      most: the largest of their first keys.
      query: where the first one stands among the keys.
      first: the first tile behind the pinned ones.
      pins: pinned tiles, which come first.
      steps: in all.
      tile: keys of a tile.
    """
    begin = pins + jnp.clip(lax.div(most + (tile - 1), jnp.int32(tile)) - first, 0, steps - pins)
    last = up_to(seen.most, query)
    end = jnp.clip(pins + lax.div(last + 1, jnp.int32(tile)) - first, begin, steps)
    return jnp.int32(0), begin, end, steps


def padded(x_BT: Array, tile: int) -> Array:
    """int32, with zeros up to a multiple of the tile."""
    return jnp.pad(x_BT.astype(jnp.int32), ((0, 0), (0, -x_BT.shape[1] % tile)))

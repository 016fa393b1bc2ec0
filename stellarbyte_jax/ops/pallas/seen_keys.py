"""Which keys queries of an aligned row see, as kernels read it: bounds of each query, and of tiles of queries and keys.

B batch, T queries, S keys, Q tiles of queries, K tiles of keys.
"""

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

HALF = 64  # queries or keys of a warpgroup
PINNED = 2


@struct.dataclass
class Seen:
    """Query t sees key j where ``first <= j <= t + offset``, and where ``document <= j <= t + offset`` a pinned one.

    Both bounds grow with t.

    Attributes:
      first_BT: int32.
      document_BT: int32, the first key of the query's document.
      kinds_BS: int32, 0 for a key that nobody sees, 2 for a pinned one, which no window hides, 1 for others; None
        where all are others.
      offset: static.
      keys: static; how many there are.
    """

    first_BT: Array
    document_BT: Array
    kinds_BS: Array | None
    offset: int = struct.field(pytree_node=False)
    keys: int = struct.field(pytree_node=False)

    @property
    def most(self) -> int | None:
        """The last key, where a query could be taken to see others behind it; else None."""
        return self.keys - 1 if self.first_BT.shape[1] + self.offset > self.keys else None


def seen_keys(
    queries: int,
    segments_BS: Int[Array, "B S"],
    window: int | None,
    pinned_BS: Bool[Array, "B S"] | None = None,
    valid_BS: Bool[Array, "B S"] | None = None,
) -> Seen:
    """What queries at the end of the row see.

    Args:
      queries: T.
      segments_BS: document of each key; equal ids are neighbours.
      window: number of keys that a query sees, itself included; None for all.
      pinned_BS: keys that no window hides; None for none.
      valid_BS: False for keys that nobody sees; None for none.
    """
    S = segments_BS.shape[1]
    keys_S = jnp.arange(S, dtype=jnp.int32)
    begins_BS = jnp.pad(segments_BS[:, 1:] != segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    document_BS = lax.cummax(jnp.where(begins_BS, keys_S[None], 0), axis=1)
    first_BS = document_BS if window is None else jnp.maximum(document_BS, keys_S[None] - (window - 1))
    kinds_BS = None
    if window is not None and pinned_BS is not None:
        kinds_BS = jnp.where(pinned_BS, PINNED, 1)
    if valid_BS is not None:
        kinds_BS = jnp.where(valid_BS, jnp.int32(1) if kinds_BS is None else kinds_BS, 0)
    offset = S - queries
    return Seen(first_BS[:, offset:], document_BS[:, offset:], kinds_BS, offset, S)


def key_ranges(seen: Seen, tile: int) -> Int[Array, "6 B Q"]:
    """Tiles of keys that each tile of 128 queries reads: some pinned ones, then those up to the diagonal.

    Args:
      seen: what sees what.
      tile: keys of a tile.

    Returns:
      int32: the first pinned tile and the one behind the last; the first other tile and the one behind the last; for
      each half of the queries the largest of their first keys.
    """
    B, T = seen.first_BT.shape
    queries, keys = 2 * HALF, seen.keys
    first_BQt = _tiled(seen.first_BT, queries)
    Q = first_BQt.shape[1]
    least_BQ = jnp.min(first_BQt, axis=2) // tile
    last_Q = jnp.minimum((jnp.arange(Q, dtype=jnp.int32) + 1) * queries, T) - 1 + seen.offset
    behind_BQ = jnp.broadcast_to(jnp.minimum(last_Q, keys - 1)[None] // tile + 1, (B, Q))
    most_BQ2 = jnp.max(_tiled(seen.first_BT, HALF), axis=2)
    most_BQ2 = jnp.pad(most_BQ2, ((0, 0), (0, 2 * Q - most_BQ2.shape[1])), mode="edge").reshape(B, Q, 2)
    pinned_BQ = behind_pinned_BQ = jnp.zeros((B, Q), jnp.int32)
    if seen.kinds_BS is not None:
        keys_11S = jnp.arange(keys, dtype=jnp.int32)[None, None]
        from_BQ = jnp.min(_tiled(seen.document_BT, queries), axis=2)
        pinned_B1S = (seen.kinds_BS == PINNED)[:, None]
        inside_BQS = (keys_11S >= from_BQ[..., None]) & (keys_11S < least_BQ[..., None] * tile) & pinned_B1S
        any_BQ = jnp.any(inside_BQS, axis=2)
        pinned_BQ = jnp.where(any_BQ, jnp.min(jnp.where(inside_BQS, keys_11S, keys), axis=2) // tile, 0)
        behind_pinned_BQ = jnp.where(any_BQ, jnp.max(jnp.where(inside_BQS, keys_11S, 0), axis=2) // tile + 1, 0)
        most_BQ2 = jnp.maximum(most_BQ2, _behind_hidden(seen.kinds_BS)[:, None, None])
    rows = [pinned_BQ, behind_pinned_BQ, least_BQ, behind_BQ, most_BQ2[..., 0], most_BQ2[..., 1]]
    return jnp.stack(rows).astype(jnp.int32)


def query_ranges(seen: Seen, tile: int) -> Int[Array, "4 B K"]:
    """Tiles of queries that read each tile of 128 keys.

    Args:
      seen: what sees what.
      tile: queries of a tile.

    Returns:
      int32: the first tile of queries and the one behind the last; for each half of the keys the tile from which on
      queries may not see the first of them.
    """
    T, wide = seen.first_BT.shape[1], 2 * HALF
    keys = seen.keys
    first_BQt = _tiled(seen.first_BT, tile)
    Q, K = first_BQt.shape[1], -(-keys // wide)
    starts_1K, tiles_Q = wide * jnp.arange(K, dtype=jnp.int32)[None], jnp.arange(Q, dtype=jnp.int32)
    last_Q = jnp.minimum((tiles_Q + 1) * tile, T) - 1 + seen.offset
    near_BQK = jnp.min(first_BQt, axis=2)[..., None] < starts_1K[None] + wide
    if seen.kinds_BS is not None:
        pins_BS = jnp.where(seen.kinds_BS == PINNED, jnp.arange(keys, dtype=jnp.int32)[None], -1)
        last_pinned_BK = jnp.max(_tiled(pins_BS, wide), axis=2)
        near_BQK |= last_pinned_BK[:, None] >= jnp.min(_tiled(seen.document_BT, tile), axis=2)[..., None]
    visits_BQK = near_BQK & (last_Q[:, None] >= starts_1K)[None]
    any_BK = jnp.any(visits_BQK, axis=1)
    begin_BK = jnp.where(any_BK, jnp.argmax(visits_BQK, axis=1), 0)
    end_BK = jnp.where(any_BK, Q - jnp.argmax(visits_BQK[:, ::-1], axis=1), 0)
    most_BQ = jnp.max(first_BQt, axis=2)
    whole_2BK = []
    for half_1K in (starts_1K, starts_1K + HALF):
        whole_BK = jnp.sum(most_BQ[..., None] <= half_1K[None], axis=1, dtype=jnp.int32)
        if seen.kinds_BS is not None:
            whole_BK = jnp.where(half_1K < _behind_hidden(seen.kinds_BS)[:, None], 0, whole_BK)
        whole_2BK.append(whole_BK)
    return jnp.stack([begin_BK, end_BK, *whole_2BK]).astype(jnp.int32)


def _behind_hidden(kinds_BS: Array) -> Int[Array, " B"]:
    """The key behind the last one that nobody sees."""
    behind_S = jnp.arange(1, kinds_BS.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(kinds_BS == 0, behind_S[None], 0), axis=1)


def _tiled(x_BT: Array, tile: int) -> Array:
    """[B, T] as [B, tiles, tile]; what is missing in the last tile is the last one again."""
    B, T = x_BT.shape
    return jnp.pad(x_BT, ((0, 0), (0, -T % tile)), mode="edge").reshape(B, -1, tile)

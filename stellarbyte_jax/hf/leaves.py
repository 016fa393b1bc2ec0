"""Leaves while tensors are made of them: a lazy one is in memory from its first use to its last."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stellarbyte_jax.hf.table import Entry, Piece
from stellarbyte_jax.model.lazy import LazyArray
from stellarbyte_jax.sharding import give_part, part_on_host


def leaf_after_leaf(entries: Iterable[Entry]) -> list[Entry]:
    """Tensors in an order in which those of one leaf follow each other.

    A leaf holds a weight of many layers. Layer after layer, each would be needed from the first tensor to the last.
    """
    entries = list(entries)
    first: dict[str, int] = {}
    for entry in entries:
        for piece in entry.pieces:
            first.setdefault(piece.path, len(first))
    return sorted(entries, key=lambda entry: min(first[piece.path] for piece in entry.pieces))


class Leaves:
    """The parts of leaves that tensors are made of; every part may be taken once."""

    def __init__(self, leaves: Mapping[str, Any], entries: Iterable[Entry]) -> None:
        """Reads nothing; ``leaves`` by path are arrays of numpy or JAX, or lazy ones."""
        self._leaves = leaves
        self._left = Counter(piece.path for entry in entries for piece in entry.pieces)
        self._read: dict[str, np.ndarray] = {}

    def take(self, piece: Piece) -> np.ndarray:
        """The part that a piece names, in our layout."""
        leaf = self._leaves[piece.path]
        if isinstance(leaf, LazyArray):
            if piece.path not in self._read:
                self._read[piece.path] = leaf.read()
            leaf = self._read[piece.path]
        self._left[piece.path] -= 1
        if not self._left[piece.path]:
            self._read.pop(piece.path, None)
        return part_on_host(leaf, piece.index)

    def give(self, piece: Piece) -> None:
        """Takes part where another process takes this part of a leaf that lies on the devices of several."""
        give_part(self._leaves[piece.path], piece.index)

"""Arrays that are read when their numbers are needed, so that a whole model need not be in memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array


@dataclass(frozen=True)
class LazyArray:
    """An array that was not read yet, as a leaf of a tree of weights.

    Attributes:
      shape: its axes.
      dtype: of its numbers.
      read: gives the numbers as an array of numpy of this shape and dtype; every call reads them anew.
      read_at: gives one index of the first axis alone; None where the array is read whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_at: Callable[[int], np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers in memory."""
        return self.size * self.dtype.itemsize


Leaf = LazyArray | np.ndarray | Array


def lazy(leaf: Leaf) -> LazyArray:
    """A leaf as a lazy array: itself if it is one, else one that holds the array of numpy or JAX."""
    if isinstance(leaf, LazyArray):
        return leaf
    return LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.asarray(leaf))


def as_numpy(leaf: Leaf) -> np.ndarray:
    """The numbers of a leaf, which is a lazy array, or one of numpy or JAX."""
    return leaf.read() if isinstance(leaf, LazyArray) else np.asarray(leaf)

"""How many bytes of arrays are in memory at the same time, whatever the machine."""

import weakref

import numpy as np

from stellarbyte_jax.model.lazy import LazyArray


class LiveArrays:
    """Counts arrays that were made through it and that something still holds, be it by a view.

    Attributes:
      peak: the most bytes that were in memory when an array had just been made.
      made: number of arrays.
    """

    def __init__(self) -> None:
        self._alive: list[tuple[weakref.ref[np.ndarray], int]] = []
        self.peak = 0
        self.made = 0

    def copy(self, array: np.ndarray) -> np.ndarray:
        """The array anew, which is counted."""
        copied = np.array(array)
        self._alive = [(ref, size) for ref, size in self._alive if ref() is not None]
        self._alive.append((weakref.ref(copied), copied.nbytes))
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        self.made += 1
        return copied

    def lazy(self, array: np.ndarray) -> LazyArray:
        """The array as one that is read later, and counted from then on."""
        return LazyArray(array.shape, array.dtype, lambda: self.copy(array))

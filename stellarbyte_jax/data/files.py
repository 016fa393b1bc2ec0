"""Files read by position. Nothing is mapped: reading a map of a file that became shorter kills the process."""

import os
import weakref

import numpy as np


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the rule and the likely fix."""


class ByteFile:
    """Bytes of a file.

    Attributes:
      size: when it was opened.
    """

    def __init__(self, path: str) -> None:
        """Opens the file."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, count: int) -> bytes:
        """Bytes from ``start`` on; DataError where the file is shorter now than when it was opened."""
        parts = [os.pread(self._descriptor, count, start)]
        while parts[-1] and (have := sum(map(len, parts))) < count:  # one call reads 2 GiB at most
            parts.append(os.pread(self._descriptor, count - have, start + have))
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(found) < count:
            raise DataError(
                f"{self._path} became shorter while it was read: it ends before byte {start + count}. Put it back as "
                "it was and start again; the checkpoints are kept"
            )
        return found


class ArrayFile:
    """The array in a ``.npy`` file, of which parts are read."""

    def __init__(self, path: str) -> None:
        """Reads the header; ValueError where it is not that of an array with one axis."""
        header = np.load(path, mmap_mode="r", allow_pickle=False)
        if header.ndim != 1:
            raise ValueError(f"{path} holds an array of {header.ndim} dimensions")
        self._dtype, self._begin, self._count = header.dtype, header.offset, len(header)
        self._bytes = ByteFile(path)

    def __len__(self) -> int:
        """How many numbers it holds."""
        return self._count

    def part(self, start: int, stop: int) -> np.ndarray:
        """Numbers from ``start`` to ``stop``."""
        size = self._dtype.itemsize
        found = self._bytes.read(self._begin + start * size, (stop - start) * size)
        return np.frombuffer(found, self._dtype)

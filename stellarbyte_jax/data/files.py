"""Files read by position. Nothing is mapped: reading a map of a file that became shorter kills the process."""

import os
import weakref
from typing import BinaryIO

import numpy as np

# Each open file holds a descriptor, and 1,024 is a common limit.
OPEN_FILES = 128
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the rule and the likely fix."""


class BadRecordError(ValueError):
    """One unusable record.

    ``column`` is counted from 1 where a place inside a line is known, ``line`` from the record's first, which is 0.
    """

    def __init__(self, message: str, column: int | None = None, line: int = 0):
        """Keeps the message and the place inside the record."""
        super().__init__(message)
        self.column = column
        self.line = line


def write_array(out: BinaryIO, array: np.ndarray) -> None:
    """As ``np.save``, whose error for a write that fails does not say why it did."""
    np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
    out.write(np.ascontiguousarray(array).data)


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

    def expect(self, size: int) -> None:
        """Raises DataError where the file is shorter than it once was."""
        if self.size < size:
            raise self._shorter(f": it has {self.size} bytes and had {size}")

    def _shorter(self, how: str) -> DataError:
        return DataError(
            f"{self._path} became shorter{how}. Put it back as it was and start again; the checkpoints are kept"
        )

    def read(self, start: int, count: int) -> bytes:
        """Bytes from ``start`` on; DataError where the file is shorter now than when it was opened."""
        parts = [os.pread(self._descriptor, count, start)]
        while parts[-1] and (have := sum(map(len, parts))) < count:  # one call reads 2 GiB at most
            parts.append(os.pread(self._descriptor, count - have, start + have))
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(found) < count:
            raise self._shorter(f" while it was read: it ends before byte {start + count}")
        return found


class ArrayFile:
    """The array in a ``.npy`` file, of which parts are read."""

    def __init__(self, path: str) -> None:
        """Reads the header; ValueError where it is not that of an array with one axis, or less than that follows."""
        with open(path, "rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                shape, _, self._dtype = _HEADERS[version](file)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path} is damaged or became shorter ({error})") from error
            self._begin = file.tell()
        if len(shape) != 1 or self._dtype.hasobject:
            raise ValueError(f"{path} holds an array of {len(shape)} dimensions of {self._dtype}")
        (self._count,) = shape
        self._bytes = ByteFile(path)
        self._bytes.expect(self._begin + self._count * self._dtype.itemsize)

    def __len__(self) -> int:
        """How many numbers it holds."""
        return self._count

    def part(self, start: int, stop: int) -> np.ndarray:
        """Numbers from ``start`` to ``stop``."""
        size = self._dtype.itemsize
        found = self._bytes.read(self._begin + start * size, (stop - start) * size)
        return np.frombuffer(found, self._dtype)

"""Where the lines of a file begin, so that any of them can be read without those before it."""

import array
import codecs
import functools
from pathlib import Path
from typing import TextIO

import numpy as np

from stellarbyte_jax.data.files import OPEN_FILES, ArrayFile, ByteFile

_SCAN_BYTES = 1 << 26
_SCAN_CHARACTERS = 1 << 20
_GLANCE_BYTES = 1 << 10
_MARK = "\ufeff"
_ERRORS = "surrogateescape"
_NEWLINE = 10


def index_lines(path: Path) -> np.ndarray:
    """The lines of a file that are not blank: int64 [2 * lines + 1].

    Of each its first byte and its number, from 1; last the size of the file.
    """
    file = ByteFile(str(path))
    parts = [np.zeros(0, np.int64)]
    lines = 0  # that begin before the block
    starts_line = True  # whether the block's first byte does
    for begin in range(0, file.size, _SCAN_BYTES):
        block = np.frombuffer(file.read(begin, min(_SCAN_BYTES, file.size - begin)), np.uint8)
        starts = np.flatnonzero(block == _NEWLINE) + 1
        if starts_line:
            starts = np.concatenate([np.zeros(1, np.int64), starts])
        starts_line = len(starts) > 0 and starts[-1] == len(block)
        if starts_line:
            starts = starts[:-1]
        numbers = np.arange(lines + 1, lines + 1 + len(starts))
        lines += len(starts)
        # Only lines that begin with white space, or the file's first with a mark, can be blank: looked at one by one.
        keep = np.ones(len(starts), bool)
        for i in np.flatnonzero((block[starts] <= ord(" ")) | (starts + begin == 0)):
            keep[i] = not _is_blank(file, begin + int(starts[i]))
        parts.append(np.stack([starts + begin, numbers], axis=1)[keep].reshape(-1))
    return np.concatenate([*parts, np.array([file.size], np.int64)])


def index_paragraphs(path: Path) -> np.ndarray:
    """As :func:`index_lines`, of the first line of each paragraph; ``PlainSource`` says which lines are blank."""
    found = array.array("q")
    at = number = 0
    follows_blank = True
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            is_blank = not (line.removeprefix(_MARK) if number == 1 else line).strip()
            if follows_blank and not is_blank:
                found.extend((at, number))
            follows_blank = is_blank
            at += len(line.encode(errors=_ERRORS))
    found.append(at)
    return np.array(found, np.int64)


def holds_text(path: Path) -> bool:
    """Whether a file holds anything but white space and a byte order mark."""
    with _open_text(path) as file:
        begin = file.read(_SCAN_CHARACTERS).removeprefix(_MARK)
        return bool(begin.strip()) or any(part.strip() for part in iter(lambda: file.read(_SCAN_CHARACTERS), ""))


def _open_text(path: Path) -> TextIO:
    """A file whose lines end as anywhere, and keep their ends; what is not UTF-8 gives the same bytes again."""
    return open(path, encoding="utf-8", errors=_ERRORS, newline="")


def _is_blank(file: ByteFile, start: int) -> bool:
    """Whether the line that begins there holds nothing but white space and, at the file's beginning, a mark."""
    at = start
    while at < file.size:
        part = file.read(at, min(_GLANCE_BYTES, file.size - at))
        line, newline, _ = part.partition(b"\n")
        if (line.removeprefix(codecs.BOM_UTF8) if at == 0 else line).strip():
            return False
        if newline:
            return True
        at += len(part)
    return True


class Lines:
    """The lines that :func:`index_lines` found, read by position.

    Attributes:
      count: how many there are.
    """

    def __init__(self, path: str, index: str) -> None:
        """Opens the file and its index, which is not held in memory.

        Raises:
          DataError: the file became shorter.
        """
        self._file, self._index = ByteFile(path), ArrayFile(index)
        self.count = len(self._index) // 2
        self._size = int(self._index.part(2 * self.count, 2 * self.count + 1)[0])
        self._file.expect(self._size)

    def read(self, row: int) -> bytes:
        """A line, with what follows it up to the next one that is not blank; without the byte order mark.

        Raises:
          DataError: the file became shorter.
        """
        start, _, end = self._index.part(2 * row, 2 * row + 3).tolist()
        line = self._file.read(start, end - start)
        return line.removeprefix(codecs.BOM_UTF8) if start == 0 else line

    def number(self, row: int) -> int:
        """The number of a line in the file, from 1."""
        return int(self._index.part(2 * row + 1, 2 * row + 2)[0])


open_index = functools.lru_cache(maxsize=OPEN_FILES)(Lines)

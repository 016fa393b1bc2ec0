"""Plain text as documents: a whole file, or each of its paragraphs."""

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte_jax.data.files import BadRecordError, DataError
from stellarbyte_jax.data.line_index import open_index


@dataclass(frozen=True)
class PlainSource:
    """The text of a file: one document, or with an ``index`` of paragraphs each of them.

    A document is a record with the one field "text". Ends of lines are newlines there, however the file spells them.
    """

    name: str
    size: int  # bytes when it was opened
    index: str | None = None
    documents: int = 1

    @property
    def unit(self) -> str:
        """What a record is, for messages."""
        return "file" if self.index is None else "paragraph"

    def record(self, row: int) -> dict[str, Any]:
        """The document in the given row as ``{"text": ...}``.

        Raises:
          BadRecordError: it is not UTF-8.
          DataError: the file became shorter.
        """
        return {"text": _decoded(self._whole() if self.index is None else self._paragraph(self.index, row))}

    def location(self, row: int, column: int | None = None, line: int = 0) -> str:
        """``file:line`` or ``file:line:column``, ``line`` lines after the first of a row, for messages."""
        number = line + (1 if self.index is None else open_index(self.name, self.index).number(row))
        if self.index is None and column is None:
            return self.name
        return f"{self.name}:{number}" + (f":{column}" if column is not None else "")

    def _whole(self) -> bytes:
        content = Path(self.name).read_bytes()
        if len(content) < self.size:
            raise DataError(
                f"{self.name} became shorter: it has {len(content)} bytes and had {self.size}. Put it back as it was "
                "and start again; the checkpoints are kept"
            )
        return content.removeprefix(codecs.BOM_UTF8)

    def _paragraph(self, index: str, row: int) -> bytes:
        return open_index(self.name, index).read(row).rstrip()  # blank lines may follow


def _decoded(content: bytes) -> str:
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise BadRecordError("not valid UTF-8; save the file as UTF-8", column, line) from error

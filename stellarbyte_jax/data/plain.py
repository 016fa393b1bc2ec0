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

    A document is a record with the one field "text". Lines end as Python's ``open`` reads them: at a newline, a
    carriage return, or both, which are a newline in the text. Other characters at which ``str.splitlines`` parts lines
    (form feed, U+0085, U+2028 and more) stay in them. A line is blank where ``str.strip`` leaves nothing, so also one
    of U+3000 or U+00A0; blank lines around a paragraph are no part of it.
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
        if self.index is None:
            return {"text": _decoded(self._whole())}
        return {"text": _decoded(open_index(self.name, self.index).read(row)).rstrip()}  # blank lines may follow

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


def _decoded(content: bytes) -> str:
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        before = content[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        column = len(before) - before.rfind(b"\n")
        raise BadRecordError("not valid UTF-8 (save the file as UTF-8)", column, before.count(b"\n")) from error

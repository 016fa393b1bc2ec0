"""How a record of the data becomes text: its fields, or a template."""

import functools
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.data.files import BadRecordError, DataError
from stellarbyte_jax.data.plain import PlainSource
from stellarbyte_jax.data.sources import RecordSource


class UnusableRecordError(DataError):
    """A record that has no text, which ``data.on_error=skip`` leaves out."""


@dataclass(frozen=True)
class TextFormat:
    """How a record becomes text: ``template.format(**record)``, or ``fields`` joined by a newline."""

    fields: tuple[str, ...] = ("text",)
    template: str | None = None

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The fields that are read.

        Raises:
          DataError: the template is malformed or names no field.
        """
        if self.template is None:
            return self.fields
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise DataError(
                f"data.template {self.template!r}: {error}; write {{{{ and }}}} for literal braces"
            ) from error
        names = [name for _, name, _, _ in parsed if name is not None]
        wrong = [name for name in names if not name.isidentifier()]
        if wrong or not names:
            raise DataError(
                f"data.template {self.template!r} must name fields as {{field}}"
                + (f", {{{wrong[0]}}} is not a field name; write {{{{ and }}}} for literal braces" if wrong else "")
            )
        try:
            self.template.format_map(dict.fromkeys(names, "x"))
        except (ValueError, KeyError) as error:
            raise DataError(
                f"data.template {self.template!r} cannot be filled in with texts ({error}): name fields as {{field}} "
                "alone"
            ) from error
        return tuple(dict.fromkeys(names))

    @functools.cached_property
    def meaning(self) -> tuple[tuple[str, str, str, str], ...]:
        """Literals, each with the field that follows it, its conversion and its format: equal where all texts are.

        Raises:
          DataError: the template is malformed or names no field.
        """
        if self.template is None:
            names = dict.fromkeys(self.fields)
            return tuple(("\n" if number else "", name, "", "") for number, name in enumerate(names))
        assert self.columns
        found: list[tuple[str, str, str, str]] = []
        literal = ""
        for text, name, spec, conversion in string.Formatter().parse(self.template):
            literal += text
            if name is not None:
                # All values are strings: "s" asks for what they are.
                found.append((literal, name, (conversion or "").replace("s", ""), "" if spec == "s" else spec or ""))
                literal = ""
        return (*found, (literal, "", "", "")) if literal else tuple(found)

    def render(self, record: Mapping[str, Any]) -> str:
        """The text of a record.

        Raises:
          BadRecordError: a field is missing, is not a string or holds a lone surrogate.
        """
        values = self.values(record)
        text = "\n".join(values.values()) if self.template is None else self.template.format_map(values)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecordError(f"half of a surrogate pair at character {error.start + 1} of the text") from error
        return text

    def values(self, record: Mapping[str, Any]) -> dict[str, str]:
        """The fields that are read, in their order.

        Raises:
          BadRecordError: a field is missing or is not a string.
        """
        values: dict[str, str] = {}
        for name in self.columns:
            if name not in record:
                present = listed(record) or "none"
                raise BadRecordError(f"no field {name!r}; the fields here are: {present}; name one of these")
            value = record[name]
            if not isinstance(value, str):
                raise BadRecordError(f"field {name!r} must be a string, it is {type(value).__name__}")
            values[name] = value
        return values


def read_text(
    source: RecordSource,
    row: int,
    text: TextFormat,
    skip: str | None = "data.on_error=skip",
) -> str:
    """The text of one record; ``skip`` is the setting that leaves out unusable ones, for messages.

    Raises:
      UnusableRecordError: names file, line and column or field.
      DataError: the file became shorter.
    """
    try:
        return text.render(source.record(row))
    except BadRecordError as error:
        raise unusable(source, row, error, skip) from error


def unusable(source: RecordSource, row: int, error: BadRecordError, skip: str | None) -> UnusableRecordError:
    """The error for a record, with its place and what to do."""
    remedy = f"mend the {source.unit}" + (f" or leave such {source.unit}s out with {skip}" if skip else "")
    return UnusableRecordError(f"{source.location(row, error.column, error.line)}: {error}; {remedy}")


def read_plain(path: Path, skip: str | None = None) -> str:
    """The text of a file that is one document, without the byte order mark and with newlines as ends of lines.

    Raises:
      UnusableRecordError: it is not UTF-8; names file, line and column as for a line of records.
    """
    return read_text(PlainSource(str(path), size=0), 0, TextFormat(), skip)

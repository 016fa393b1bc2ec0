"""Values that files of others hold: JSON that is read, and what a message says of them.

Such a file may be hostile. A message that shows its content stays one short line, whatever the content is.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_LONGEST_FILE_NAME = 255  # bytes; the operating system refuses to look for a longer one
_LONGEST = 200
_MOST_NAMES = 5
_DIGITS = 12


def clipped(text: str, longest: int = _LONGEST) -> str:
    """The text as part of a line: control characters escaped, the middle of a long one cut out."""
    short = _without_middle(text, longest)  # first, since escaping megabytes takes time
    return _without_middle("".join(c if c.isprintable() else repr(c)[1:-1] for c in short), longest)


def _without_middle(text: str, longest: int) -> str:
    head, tail = longest * 2 // 3, longest // 4
    return text if len(text) <= longest else f"{text[:head]} ... {text[-tail:]}"


def shown(value: Any) -> str:
    """A value in a message: its ``repr``, clipped."""
    try:
        return clipped(repr(value))
    except (ValueError, RecursionError):  # Python spells no integer of more than 4,300 digits, nor any depth
        return f"a value of type {type(value).__name__} that is too large to show"


def digits(fingerprint: Any) -> str:
    """A fingerprint in a message: its first digits, which tell it from others."""
    return clipped(fingerprint[:_DIGITS]) if isinstance(fingerprint, str) else shown(fingerprint)


def listed(names: Iterable[Any]) -> str:
    """Names in a message: the first few, each clipped, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(clipped(str(name), 100) for name in names[:_MOST_NAMES]) + more


def absent(path: str | Path) -> str:
    """That a path does not exist, and from where a relative one was looked for."""
    return f"{path} does not exist" + ("" if Path(path).is_absolute() else f" (looked from {Path.cwd()})")


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a file holds; ``where`` names the file.

    A key that is given twice is refused where its values differ: other readers, transformers among them, take the last
    one without a word. (Records of the data are read as others read them, and items of a checkpoint have checksums.)

    Raises:
      ValueError: it is not UTF-8, no JSON, no object, nested too deeply, gives a key two values, or holds a number that
        Python does not read.
    """
    try:
        values = json.loads(content.decode(), object_pairs_hook=_unambiguous)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply. Copy the file again") from None
    except _AmbiguousError as error:
        raise ValueError(f"{where} gives two values for the key {error}: keep one of them") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {clipped(str(error))}. Copy the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(values).__name__}")
    return values


class _AmbiguousError(Exception):
    pass


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if repr(value) != repr(made[key]):  # equal numbers may be of different types
                raise _AmbiguousError(f"{shown(key)}, {shown(value)} and {shown(made[key])}")
    return made


def is_file_name(value: object) -> bool:
    """Whether it names a file of the directory itself; a path could lead anywhere."""
    if not isinstance(value, str) or not value.isprintable():
        return False
    return value not in ("", ".", "..") and not set(value) & set("/\\") and len(value.encode()) <= _LONGEST_FILE_NAME

"""Files of a run with one JSON object a line, each of a step: written line by line, read although lines are damaged."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line without its end, and the object that it holds.

    The object is None where there is none, or none with a whole number ``step``: a kill cut the line short, or it is
    damaged.
    """
    with path.open("rb") as file:
        for line in file:
            stripped = line.rstrip(b"\r\n")
            yield stripped, _object(stripped)


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the lines whose object is not to be kept, and those without any; makes the file where it is missing.

    A kill in the middle of it loses nothing.
    """
    lines = read_lines(path) if path.exists() else ()
    kept = [line for line, found in lines if found is not None and keep(found)]
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    partial.replace(path)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return found if isinstance(step, int) and not isinstance(step, bool) else None

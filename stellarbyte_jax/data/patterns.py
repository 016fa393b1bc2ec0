"""Paths and globs that settings give, as the files and directories that they name."""

import errno
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.data.files import DataError
from stellarbyte_jax.data.saved_dataset import other_splits

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def expand_all(patterns: Sequence[str], setting: str) -> list[Path]:
    """The files and directories that the paths and globs of a setting name.

    Raises:
      DataError: there are no patterns, or there is nothing that one of them names.
    """
    return [path for pattern in given(patterns, setting) for path in expand(pattern, setting)]


def given(patterns: Sequence[str], setting: str) -> Sequence[str]:
    """The patterns; DataError where there are none."""
    if not patterns:
        raise DataError(f"{setting} is empty: name at least one data file, such as {setting}=data/*.jsonl")
    return patterns


def expand(pattern: str, setting: str) -> list[Path]:
    """The files and directories that a path or a glob names, sorted; ``**`` descends into folders.

    A path that exists is taken as it stands, and so are the first folders of a glob, as far as they exist: brackets in
    their names need no escape.

    Args:
      pattern: path or glob; ``~`` is the home directory.
      setting: the name of the setting that it comes from, for messages.

    Raises:
      DataError: there is none, or it cannot be looked at.
    """
    try:
        path = Path(expanded(pattern))
    except ValueError as error:
        raise DataError(f"{setting}: {error}") from error
    if not pattern.strip():
        raise DataError(f"{setting}: {pattern!r} names no file: give a path or a glob, such as {setting}=data/*.jsonl")
    has_magic = glob.has_magic(str(path))
    if _exists(path, setting, is_glob=has_magic):
        return [path]
    if "://" in pattern:
        raise DataError(f"{setting}: {clipped(pattern)} is an address, and files are read here alone: fetch it first")
    if not has_magic:
        raise DataError(f"{setting}: {path} does not exist (looked from {Path.cwd()}){other_splits(path)}")
    found = sorted(Path(p) for p in glob.glob(_with_literal_folders(path), recursive=True))
    if not found:
        raise DataError(f"{setting}: no file matches {pattern!r} (looked from {Path.cwd()})")
    for each in found:
        if not _exists(each, setting):
            raise DataError(
                f"{setting}: {each} is a link to nothing: mend or remove it, or leave it out of {pattern!r}"
            )
    return found


def _exists(path: Path, setting: str, is_glob: bool = False) -> bool:
    try:
        path.stat()
    except ValueError:  # a null character
        return False
    except OSError as error:
        if is_glob or error.errno in _ABSENT:
            return False
        raise DataError(
            f"{setting}: {clipped(str(path))} cannot be looked at: {error.strerror}; mend that or name another path"
        ) from error
    return True


def _with_literal_folders(path: Path) -> str:
    """The pattern, in which the first folders mean themselves as far as they exist."""
    parts = list(path.parts)
    for number in range(len(parts) - 1):
        if not os.path.isdir(Path(*path.parts[: number + 1])):
            break
        parts[number] = glob.escape(parts[number])
    return str(Path(*parts))

"""Data sets that ``save_to_disk`` of the datasets package wrote: which files hold their rows."""

import difflib
from pathlib import Path
from typing import Any

from stellarbyte_jax.config.foreign import is_file_name, json_object, listed, shown
from stellarbyte_jax.data.files import DataError

_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_INDICES = ("_indices_files", "_indices_data_files")


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory is a saved data set, or several as its splits."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def data_files(path: Path, setting: str) -> list[Path]:
    """The Arrow files of a saved data set, in the order of their rows.

    Args:
      path: the directory.
      setting: the name of the setting that it comes from, for messages.

    Raises:
      DataError: it holds splits of which one is to be named, a selection of rows, no files or not those it names.
    """
    if not (path / _STATE).is_file():
        splits = _splits(path)
        if not splits:
            raise DataError(f"{setting}: {path} holds no split (no folder with {_STATE}); copy the data set again")
        raise DataError(f"{setting}: {path} holds the splits {listed(splits)}: name one, such as {path / splits[0]}")
    state = _state(path / _STATE)
    if any(state.get(name) for name in _INDICES):
        raise DataError(
            f"{path} is a selection of rows from its files, which is not read: in Python, "
            "load_from_disk(...).flatten_indices().save_to_disk(...) writes the rows alone"
        )
    files = state["_data_files"]
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    if not names or not all(map(is_file_name, names)):
        raise DataError(f"{path / _STATE}: _data_files must name files of this directory, got {shown(files)}")
    found = [path / str(name) for name in names]
    missing = [file for file in found if not file.is_file()]
    if missing:
        raise DataError(f"{path}: {listed(file.name for file in missing)} is missing; copy the data set again")
    return found


def other_splits(path: Path) -> str:
    """What a message adds for a path that does not exist, where its folder holds splits: their names, and a guess."""
    splits = _splits(path.parent) if (path.parent / _SPLITS).is_file() else []
    if not splits:
        return ""
    guess = (*difflib.get_close_matches(path.name, splits, n=1), splits[0])[0]
    return f"; {path.parent} holds the splits {listed(splits)}: name one, such as {path.parent / guess}"


def _splits(path: Path) -> list[str]:
    """The splits of a data set, sorted; that for training goes first."""
    names = (p.name for p in path.iterdir() if (p / _STATE).is_file())
    return sorted(names, key=lambda name: (name != "train", name))


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json_object(path.read_bytes(), str(path))
    except ValueError as error:
        raise DataError(f"{error}, or copy the data set again") from error
    if not isinstance(state.get("_data_files"), list):
        raise DataError(f"{path}: no list _data_files; copy the data set again, or save it with save_to_disk")
    return state

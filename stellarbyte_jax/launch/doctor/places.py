"""Directories that a run writes: whether it may, how much is free, and whether locks hold there."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stellarbyte_jax import launch
from stellarbyte_jax.command import remedy
from stellarbyte_jax.launch.doctor.finding import Finding

GIB = 2**30


def existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it that exists: the doctor makes none."""
    path = Path(os.path.expanduser(path)).absolute()  # pathlib raises where there is no home directory
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_directory(name: str, path: Path, setting: str, wanted: float) -> Iterator[Finding]:
    """Whether a file can be written there, and the free space.

    Args:
      name: of the check.
      path: a directory, which need not exist yet.
      setting: what to change for another directory.
      wanted: GiB that should be free.
    """
    place = existing(path)
    shown = str(path) if place == Path(os.path.expanduser(path)).absolute() else f"{path} (to be made in {place})"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
        free = shutil.disk_usage(place).free
    except OSError as error:
        known = None if isinstance(error, FileNotFoundError) else remedy(error, setting)
        mend = known or f"choose another {setting}"
        yield Finding("fault", name, f"{shown} cannot be written: {error.strerror or error}", mend, {"path": str(path)})
        return
    facts = {"path": str(path), "free_bytes": free}
    what = f"{shown} is writable, {free / GIB:.1f} GiB free"
    if free < wanted * GIB:
        mend = f"free space, or choose another {setting}"
        yield Finding("warning", name, f"{what}, {wanted:g} wanted", mend, facts)
    else:
        yield Finding("ok", name, what, facts=facts)


def check_locks(path: Path) -> Iterator[Finding]:
    """Whether flock keeps a second process out, as the lock of a run's directory needs it.

    Args:
      path: of the directory, which must be writable.
    """
    place = existing(path)
    try:
        first = tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-")
    except OSError:  # check_directory tells it
        return
    with first, open(first.name, encoding="utf-8") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield Finding("fault", "locks", f"{place} takes no locks: {error.strerror or error}", launch.LOCKS_ADVICE)
            return
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Finding("ok", "locks", f"locks hold on {place}")
        else:
            yield Finding("fault", "locks", f"two processes could lock one file of {place}", launch.LOCKS_ADVICE)


def size_of(directory: Path) -> tuple[int, int]:
    """Bytes and number of the files below a directory; what goes meanwhile is left out."""
    size = count = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
            count += 1
    return size, count


def check_compile_cache(path: Path) -> Iterator[Finding]:
    """Whether compiled programs can be kept, and how large they have become."""
    yield from check_directory("compile cache", path, "JAX_COMPILATION_CACHE_DIR", 1)
    size, count = size_of(path)
    what = f"compile cache holds {count:,} files, {size / GIB:.2f} GiB"
    if size > 20 * GIB:
        yield Finding("warning", "compile cache", what, f"rm -r {path}, where no run compiles", {"bytes": size})
    else:
        yield Finding("ok", "compile cache", what, facts={"bytes": size})

"""The directory of a run: what it holds from its start on, and how a start that failed leaves it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stellarbyte_jax.checkpoint.store import EXPORT
from stellarbyte_jax.command import make_directory
from stellarbyte_jax.launch import LOCK, RunLock, processes

_SETTINGS = "train_config.json"


def holds_run(directory: Path) -> bool:
    """Whether a run was begun there."""
    return (directory / "checkpoints").is_dir() or (directory / _SETTINGS).is_file()


class RunDirectory:
    """The directory of a run, which a start that failed leaves as it was."""

    def __init__(self, path: Path) -> None:
        """Makes nothing yet: see :meth:`locked`."""
        self._path = path
        self._lock = RunLock(path)
        self._kept = False

    def keep(self) -> None:
        """From now on, the directory holds something that is worth keeping."""
        self._kept = True

    def check(self) -> None:
        """Raises OSError where the directory was moved or removed; the main process looks."""
        if processes.is_main():
            self._lock.check()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory, with those above it, and holds its lock: the main process does, for all.

        Where an error comes before :meth:`keep`, what was made is removed: these directories, and all that came into
        one that held no run.

        Raises:
          OSError: it cannot be made, or another run has the lock; or one of several processes does not see it.
        """
        processes.wait_for_all()  # none still looks what was here before
        if processes.is_main():
            with self._held():
                processes.from_main(self._lock.owner)
                processes.wait_for_all()
                yield
        else:
            self._lock.see(processes.from_main(str))
            processes.wait_for_all()
            yield

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        missing = [place for place in (self._path, *self._path.parents) if not place.exists()]  # innermost first
        try:
            make_directory(self._path, "output_dir")
            was_locked = (self._path / LOCK).exists()
            with self._lock:
                # Looked at as long as it is locked: another run may have been here since.
                there = {name for name in os.listdir(self._path) if was_locked or name != LOCK}
                held_run = holds_run(self._path)
                try:
                    yield
                except BaseException:
                    if not self._kept and not held_run:  # as long as it is locked: nobody else works there
                        self._remove_all_but(there)
                    raise
        except BaseException:
            if not self._kept:
                for place in missing:
                    with contextlib.suppress(OSError):  # of one that another program uses, or that was not made
                        place.rmdir()
            raise

    def _remove_all_but(self, names: set[str]) -> None:
        for name in set(os.listdir(self._path)) - names - {EXPORT}:  # a start makes no export, it puts one back
            made = self._path / name
            if made.is_dir() and not made.is_symlink():
                shutil.rmtree(made, ignore_errors=True)
            else:
                made.unlink(missing_ok=True)

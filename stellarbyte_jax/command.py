"""What all command line programs do: import quietly, end quietly, and say in one line what a user can mend."""

import contextlib
import functools
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec

from stellarbyte_jax.backend import failed_start
from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.interrupts import imports, keep_interrupts

__all__ = [
    "command",
    "directory_for",
    "drop_output",
    "imports",
    "make_directory",
    "one_line",
    "print_error",
    "remedy",
    "spelled",
]

Arguments = ParamSpec("Arguments")

_SPELLED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_LONGEST = 2000


class MendableError(Exception):
    """Something that the user can mend; the message says how."""


MENDABLE = (MendableError, ValueError, OSError, NotImplementedError, ImportError)


def command(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Makes of a program's ``main`` one that returns an exit status in every case that a user can cause.

    2 for settings that cannot be, 1 for other errors that the user can mend, after one line on standard error; 130
    after Ctrl-C; 141 where what reads the output has ended, as programs do that a broken pipe kills.
    """

    @functools.wraps(main)
    def guarded(*positional: Arguments.args, **named: Arguments.kwargs) -> int:
        keep_interrupts()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal lacks is no reason to end
                stream.reconfigure(errors="backslashreplace")
        try:
            with _warnings():
                code = main(*positional, **named)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:
            drop_output()
            return 128 + signal.SIGPIPE
        except MENDABLE as error:
            print_error(error)
            return 2 if isinstance(error, ConfigError) else 1
        except (RuntimeError, AssertionError) as error:
            problem = failed_start(error)
            if problem is None:
                raise
            print_error(MendableError(": ".join(problem)))
            return 1

    return guarded


class _Warnings(logging.Handler):
    """Warnings in one line on standard error, equal ones once; those of other packages with their names."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        name = "" if record.name.partition(".")[0] == __package__ else f"{record.name}: "
        line = f"{record.levelname.lower()}: {name}{one_line(record.getMessage())}"
        if line not in self._told:
            self._told.add(line)
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Inside it warnings look like those of a program, unless somebody has said how they are to look."""
    root = logging.getLogger()
    # Such as a library adds when it is imported.
    plain = [each for each in root.handlers if getattr(each.formatter, "_fmt", None) == logging.BASIC_FORMAT]
    if len(plain) < len(root.handlers):
        yield
        return
    handler = _Warnings()
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = plain


_process: list[str] = []


def name_process(name: str) -> None:
    """From now on, errors begin with the name of this process, which is one of several."""
    _process[:] = [f"{name}: "]


def print_error(error: BaseException, more: str = "") -> None:
    """Prints the message of an error, in one line, on standard error: its first word in red on a terminal."""
    from rich.console import Console  # takes a while, and is needed here alone
    from rich.text import Text

    message = f" {''.join(_process)}{one_line(str(error) or type(error).__name__)}{more}"
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error:", "bold red"), message))


def drop_output() -> None:
    """What is still printed goes nowhere: nobody reads standard output any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def one_line(text: str) -> str:
    """A text without line breaks and control characters, its middle left out where it is very long."""
    return clipped(" ".join(text.split("\n")), _LONGEST)


def spelled(text: str) -> str:
    """A text whose control characters, line breaks and tabs apart, are written as escapes."""
    return text.translate(_SPELLED)


_REMEDIES = {
    "File too large": "a limit on the size of a file is in force (ulimit -f): raise it",
    "Too many open files": "a limit on open files is in force (ulimit -n): raise it",
    "No space left": "the disk is full: free space or choose another {directory}",
    "Disk quota": "your quota of the disk is used up: free space or choose another {directory}",
    "No such file": "the directory was moved or removed during the run: put it back or choose another {directory}",
    "NOT_FOUND": "the directory was moved or removed during the run: put it back or choose another {directory}",
    "Not a directory": "a folder of its path is a file: choose another {directory}",
    "File exists": "there is a file where a folder belongs: move it or choose another {directory}",
    "Is a directory": "there is a folder where a file belongs: move it or choose another {directory}",
    "Permission denied": "make it writable or choose another {directory}",
    "Read-only": "make it writable or choose another {directory}",
}


_GONE = ("No such file", "NOT_FOUND")


def make_directory(path: Path, setting: str) -> None:
    """Makes a directory that is about to be written, with those above it.

    Raises:
      OSError: that cannot be; the message names it, and ``setting`` as what to change.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        known = None if isinstance(error, FileNotFoundError) else remedy(error, setting)
        advice = known or f"choose another {setting}"
        raise OSError(f"{path} cannot be made: {error.strerror or error}; {advice}") from error


@contextlib.contextmanager
def directory_for(path: Path, files: Sequence[str] = ()) -> Iterator[None]:
    """Makes a directory, with those above it, for what the block writes; a block that fails leaves none that it made.

    Others may have begun to write there too: what goes is the directories that are empty then.

    Args:
      path: the directory.
      files: names of what the block writes there, which go first; nothing where the block removes it itself.

    Raises:
      OSError: the directory cannot be made.
    """
    made = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for name in files if made else ():
            with contextlib.suppress(OSError):  # of a directory that was not made
                (path / name).unlink(missing_ok=True)
        for each in made:
            with contextlib.suppress(OSError):  # it was not made, or others have put something into it
                each.rmdir()
        raise


def remedy(error: BaseException | None, directory: str = "output_dir") -> str | None:
    """What to do about a failed write, from what the system said of it; None where it said nothing that is known.

    ``directory`` is the setting of where it was written. Libraries wrap the system's words in exceptions of their own,
    with or without a cause.
    """
    while error is not None:
        if isinstance(error, FileExistsError) and error.filename and not os.path.exists(error.filename):
            return f"{error.filename} is a link to nothing: mend the link or choose another {directory}"
        for words, advice in _REMEDIES.items():
            if words in str(error):
                if words in _GONE and directory != "output_dir":  # which no run has had open
                    return f"choose another {directory}"
                return advice.replace("{directory}", directory)
        error = error.__cause__ or error.__context__
    return None

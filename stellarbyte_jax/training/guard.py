"""The traceback of what a user can mend goes to the log of its run, one clear line to standard error."""

import contextlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from stellarbyte_jax.command import MENDABLE, print_error, remedy
from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.launch import InUseError, processes, write_failure


def run_guarded(act: Callable[[], int], output_dir: str) -> int:
    """Returns what ``act`` returns, or 1 after printing the message of an error that a user can mend.

    Raises:
      ConfigError: settings that cannot be; ``output_dir``, where nothing is written then, may be one of them.
    """
    try:
        return act()
    except ConfigError:
        raise
    except InUseError as error:  # nor in the log of a run that is another process's
        print_error(error)
        return 1
    except MENDABLE as error:
        error = _advised(error, Path(output_dir))
        if not processes.is_main():
            print_error(error)
            return 1
        log, where = Path(output_dir) / "train.log", ""
        with contextlib.suppress(OSError), log.open("r+", encoding="utf-8") as file:  # none where no run was begun
            file.seek(0, os.SEEK_END)
            file.write(traceback.format_exc())
            where = f" (details: {log})"
        print_error(error, where)
        return 1


def _advised(error: Exception, output_dir: Path) -> Exception:
    """The error; what the system said of a file of the run, or of none, with what to do about it."""
    if not isinstance(error, OSError) or error.errno is None:  # one of ours has its advice
        return error
    file = error.filename2 or error.filename
    if file is None:
        advice = remedy(error)
        return OSError(f"{error.strerror}; {advice}, start again") if advice else error
    ours = isinstance(file, str) and Path(file).absolute().is_relative_to(output_dir.absolute())
    return write_failure(Path(file), error) if ours else error

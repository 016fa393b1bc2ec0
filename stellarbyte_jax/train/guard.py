"""The traceback of what a user can mend goes to the log, one clear line to standard error."""

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path

from stellarbyte_jax.command import MENDABLE, print_error


def run_guarded(act: Callable[[], int], output_dir: str) -> int:
    """Returns what ``act`` returns, or 1 after printing the message of an error that a user can mend."""
    try:
        return act()
    except MENDABLE as error:
        log, where = Path(output_dir) / "train.log", ""
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
            where = f" (details: {log})"
        print_error(error, where)
        return 1

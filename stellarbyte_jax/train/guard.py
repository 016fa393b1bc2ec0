"""One clear line on standard error for what a user can mend; the traceback goes to the log."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.train.meter import DivergedError

MENDABLE = (ValueError, OSError, NotImplementedError, ModuleNotFoundError, CheckpointError, DivergedError)


def run_guarded(act: Callable[[], int], output_dir: str) -> int:
    """Returns what ``act`` returns, or 1 after printing the message of an error that a user can mend."""
    try:
        return act()
    except MENDABLE as error:
        log = Path(output_dir) / "train.log"
        try:
            with log.open("a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
            where = f" (details: {log})"
        except OSError:
            where = ""
        print(f"error: {error}{where}", file=sys.stderr)
        return 1

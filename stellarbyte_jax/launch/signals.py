"""Signals that end a process at once, also while its main thread is in a program of XLA and runs no Python."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One signal may come twice: a scheduler sends it to all processes of a job, and a wrapper among these (uv run, a
# container's) passes its own on. What comes within this time of a signal that was counted is the same one.
_SAME_SECONDS = 1.0


class LeaveAt:
    """Calls a function at the n-th of some signals; one more ends the process, whatever the function waits for.

    Python runs handlers in its main thread, which may be in a collective that never ends. The system's own handler
    writes each signal's number into a pipe (``signal.set_wakeup_fd``), and a thread reads it.
    """

    def __init__(self, nth: int, leave: Callable[[int], None]) -> None:
        """Takes the function, which ends the process; it is given the signal's number."""
        self._nth, self._leave = nth, leave
        self._numbers: Collection[int] = ()
        self._ends: tuple[int, int] | None = None

    def start(self, numbers: Collection[int]) -> None:
        """Begins to listen to signals that have a handler in Python. Only in the main thread."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._numbers = numbers
        self._ends = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forked)
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()

    def stop(self) -> None:
        """Ends that; whoever listened before does so again."""
        if self._ends is not None:
            write, before = self._ends
            self._ends = None
            signal.set_wakeup_fd(before)
            os.close(write)

    def _forked(self) -> None:
        """The signals of a child are not its parent's, whose pipe it has."""
        if self._ends is not None:
            with contextlib.suppress(ValueError):
                signal.set_wakeup_fd(-1)

    def _listen(self, read: int) -> None:
        count, last = 0, -math.inf
        with open(read, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                number, now = byte[0], time.monotonic()
                if number not in self._numbers or now - last < _SAME_SECONDS:
                    continue
                count, last = count + 1, now
                if count == self._nth:
                    threading.Thread(target=self._leave, args=(number,), name="leaving", daemon=True).start()
                elif count > self._nth:
                    os._exit(128 + number)

"""Ctrl-C while a program starts, and where Python drops it. Imports next to nothing, so that it is in place at once."""

import _thread
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stellarbyte_jax.backend import import_problem

_POLL_SECONDS = 0.001


@contextmanager
def imports() -> Iterator[None]:
    """Ctrl-C inside ends the program without a word: imports take seconds, and would show where they were.

    So it does where jax cannot be imported, after a line that says why. Ctrl-C does what it did where it is ignored or
    handled already, and in another thread than the main one.
    """
    with _importable(), _interruptible():
        yield


@contextmanager
def _importable() -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        problem = import_problem(error)
        if problem is None:
            raise
        sys.exit(f"error: {problem[0]}: {problem[1]}")


@contextmanager
def _interruptible() -> Iterator[None]:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # another thread than the main one
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def keep_interrupts() -> None:
    """From now on, a Ctrl-C that Python drops comes again at once.

    Python runs some code where no error can get out, and prints the error instead: finalizers, and callbacks of the
    garbage collector, of which JAX has one. A KeyboardInterrupt there would be lost.
    """
    if not isinstance(sys.unraisablehook, KeepingInterrupts):
        sys.unraisablehook = KeepingInterrupts(sys.unraisablehook)


class KeepingInterrupts:
    """A ``sys.unraisablehook`` that repeats a Ctrl-C which was dropped, and leaves the rest to another hook."""

    def __init__(self, hook):
        """Takes the other hook."""
        self._hook = hook

    def __call__(self, failure):
        """Takes what Python tells of an error that got nowhere."""
        if issubclass(failure.exc_type, KeyboardInterrupt) and callable(signal.getsignal(signal.SIGINT)):
            # Repeated here, it would be dropped again: no error gets out of this function either.
            _thread.start_new_thread(_repeat, (_thread.get_ident(), KeepingInterrupts.__call__.__code__))
        else:
            self._hook(failure)


def _repeat(thread, code):
    """Sends SIGINT to a thread as soon as it has left a function."""
    while _runs(thread, code):
        time.sleep(_POLL_SECONDS)
    if thread in sys._current_frames():
        signal.pthread_kill(thread, signal.SIGINT)


def _runs(thread, code):
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None

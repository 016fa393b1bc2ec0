"""Ctrl-C while a program starts. Imports next to nothing, so that it is in place at once."""

import signal
from contextlib import contextmanager


@contextmanager
def imports():
    """Ctrl-C inside ends the program without a word: imports take seconds, and would show where they were.

    Does nothing where Ctrl-C is ignored or handled already.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

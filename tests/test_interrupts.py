"""Does Ctrl-C come through where Python lets no error out?"""

import _thread
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stellarbyte_jax.interrupts import KeepingInterrupts, _repeat, keep_interrupts
from stellarbyte_jax.launch import quiet_libraries

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ctrl_c(monkeypatch):
    """Handled as in a program that does nothing about it; returns what was printed of errors that got nowhere."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    yield dropped
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def collecting(request):
    """Adds a callback of the garbage collector."""

    def add(act):
        def callback(phase, info):
            act(phase)

        gc.callbacks.append(callback)
        request.addfinalizer(lambda: gc.callbacks.remove(callback) if callback in gc.callbacks else None)

    return add


def wait(seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)


class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("place", ["start", "stop", "both", "finalizer", "raised"])
def test_a_dropped_interrupt_comes_again(place, ctrl_c, collecting):
    keep_interrupts()
    left = ["start", "stop"] if place == "both" else [place]

    def act(phase):
        if phase in left:
            left.remove(phase)
            signal.raise_signal(signal.SIGINT)
        elif "raised" in left:
            left.clear()
            raise KeyboardInterrupt

    collecting(act)
    with pytest.raises(KeyboardInterrupt):
        if place == "finalizer":
            Finalized()
        else:
            gc.collect()
        wait()
    with contextlib.suppress(KeyboardInterrupt):  # two of them, unless both came at once
        time.sleep(0.2 if place == "both" else 0)
    assert ctrl_c == []


def test_it_does_not_come_where_it_would_be_dropped_again(ctrl_c):
    left = []

    def place():
        _thread.start_new_thread(_repeat, (_thread.get_ident(), place.__code__))
        time.sleep(0.2)
        left.append(True)

    with pytest.raises(KeyboardInterrupt):
        place()
        wait()
    assert left


def test_a_thread_that_has_ended_gets_none(monkeypatch):
    """The system would take its number for that of any thread, or end the program."""
    sent = []
    monkeypatch.setattr(signal, "pthread_kill", lambda *given: sent.append(given))
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    for each in (thread.ident, threading.get_ident()):
        _repeat(each, pytest.fixture.__code__)
    assert sent == [(threading.get_ident(), signal.SIGINT)]


def test_other_errors_are_left_to_the_hook_that_was_there(ctrl_c, collecting):
    before = sys.unraisablehook
    keep_interrupts()
    once = sys.unraisablehook
    keep_interrupts()
    assert sys.unraisablehook is once is not before, "it is put there once"

    def fail(phase):
        raise ValueError(phase)

    collecting(fail)
    gc.collect()
    assert [str(failure.exc_value) for failure in ctrl_c] == ["start", "stop"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_one_that_nobody_handles_is_no_business_of_ours(handler, ctrl_c):
    signal.signal(signal.SIGINT, handler)
    failure = type("Failure", (), {"exc_type": KeyboardInterrupt})
    KeepingInterrupts(ctrl_c.append)(failure)
    assert ctrl_c == [failure]


def test_a_run_keeps_them_too(ctrl_c, collecting, monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "__unraisablehook__", dropped.append)
    quiet_libraries()
    phases = ["start"]
    collecting(lambda phase: phases and phases.pop() and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        gc.collect()
        wait()
    assert dropped == []


PROGRAM = """
import gc, signal, sys, time
import jax
from stellarbyte_jax.command import command
signal.signal(signal.SIGINT, signal.default_int_handler)
(callback,) = [each for each in gc.callbacks if "xla" in each.__name__]
@command
def main():
    sent = []
    def tracing(frame, event, argument):  # a signal comes while JAX is called by the collector
        if frame.f_code is callback.__code__ and not sent:
            sent.append(1)
            signal.raise_signal(signal.SIGINT)
    sys.setprofile(tracing)
    gc.collect()
    sys.setprofile(None)
    time.sleep(60)
    return 0
sys.exit(main())
"""


def test_a_command_that_is_interrupted_in_jax_ends():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")

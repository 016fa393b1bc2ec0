"""Worker processes: order, errors, signals, and an end whatever happens to them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
from helpers.processes import alive, until

from stellarbyte_jax.data.sources import DataError
from stellarbyte_jax.data.workers import Workers, signals_blocked


class Squares(Sequence):
    """Its elements name the process that makes them; the tenth, where it is asked for, is ``special()``."""

    def __init__(self, length, special=None, size=0):
        self.length, self.special, self.size = length, special, size

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        if number == 10 and self.special is not None:
            self.special()
        return number**2, os.getpid(), b"x" * self.size


def failing(kind, *arguments):
    def special():
        raise kind(*arguments)

    return special


class UnportableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.fixture
def started():
    """Makes workers, which are closed at the end."""
    made = []

    def start(elements, count):
        made.append(Workers(elements, count))
        return made[-1]

    yield start
    for workers in made:
        workers.close()


@pytest.mark.parametrize("count", [1, 3])
def test_elements_come_in_order_from_all_workers(started, count):
    workers = started(Squares(20), count)
    found = list(workers)
    assert [square for square, *_ in found] == [number**2 for number in range(20)]
    assert len({process for _, process, _ in found}) == count
    assert all(found[i][1] == found[i % count][1] for i in range(20))
    assert list(workers) == []


def test_an_error_comes_in_its_turn_with_where_it_was_raised(started):
    workers = started(Squares(20, failing(DataError, "line 11 is bad")), 2)
    assert [next(workers)[0] for _ in range(10)] == [number**2 for number in range(10)]
    with pytest.raises(DataError, match="line 11 is bad") as caught:
        next(workers)
    assert "in special" in str(caught.value.__cause__)


def test_an_error_that_cannot_travel_is_told(started):
    workers = started(Squares(20, failing(UnportableError, "this", "that")), 1)
    with pytest.raises(RuntimeError, match="UnportableError: this and that"):
        list(workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_lost_worker_is_one_error_also_in_the_middle_of_a_message(started, number, capfd):
    """Elements larger than a pipe, so that the worker is inside of one when it is killed."""
    workers = started(Squares(1000, size=1 << 22), 2)
    process = next(workers)[1]
    time.sleep(0.2)
    os.kill(process, number)
    how = "was killed, as the system does where memory runs out" if number == signal.SIGKILL else "ended by SIGSEGV"
    with pytest.raises(DataError, match=rf"data worker 1 of 2 \(process {process}\) .*{how}"):
        for _ in range(1000):
            next(workers)
    began = time.monotonic()
    workers.close()
    assert time.monotonic() - began < 20
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_leaves_by_itself_is_told(started):
    with pytest.raises(DataError, match=r"ended with status 7: start again; data\.workers=0 reads the data without"):
        list(started(Squares(20, lambda: os._exit(7)), 1))


@pytest.mark.parametrize("state", ["running", "killed", "stopped"])
def test_closing_ends_all_workers(started, state):
    workers = started(Squares(10**9, size=1 << 22), 2)
    processes = [next(workers)[1], next(workers)[1]]
    if state != "running":
        os.kill(processes[0], signal.SIGKILL if state == "killed" else signal.SIGSTOP)
    workers.close()
    until(lambda: not any(alive(process) for process in processes))
    workers.close()  # again does nothing


def test_workers_never_see_the_signals_that_stop_a_program(started):
    workers = started(Squares(200), 2)
    processes = {next(workers)[1], next(workers)[1]}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for process in processes:
            os.kill(process, number)
    assert len(list(workers)) == 198


NEVER_CLOSED = """
from stellarbyte_jax.data.workers import Workers
workers = Workers(range(10**9), 2)
next(workers)
print(*(process.pid for process in workers._processes))
"""


def test_a_program_that_never_closes_them_ends_and_so_do_they():
    """At exit Python tells daemons to stop by a signal that these block, and would wait for them."""
    done = subprocess.run([sys.executable, "-c", NEVER_CLOSED], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    until(lambda: not any(alive(process) for process in done.stdout.split()))


def blocked():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_signals_are_blocked_inside_alone():
    before = blocked()
    stopping = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    assert not before & stopping
    with signals_blocked():
        assert blocked() == before | stopping
        with signals_blocked():
            pass
        assert blocked() == before | stopping, "the inner one gives back what it found"
    assert blocked() == before
    with pytest.raises(RuntimeError), signals_blocked():
        raise RuntimeError
    assert blocked() == before

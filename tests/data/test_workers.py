"""Worker processes: order, errors, signals, and an end whatever happens to them."""

import errno
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import spawn
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import alive, until

from stellarbyte_jax.data import workers as workers_module
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


class ChangingError(Exception):
    """Says something else after a journey: what it was made with is not what it holds."""

    def __init__(self, what):
        super().__init__(f"the {what} is bad")


class Panic(BaseException):
    """No Exception."""


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        (ChangingError, "line", "^ChangingError: the line is bad$"),
        (Panic, "a library", "^Panic: a library$"),
        (SystemExit, 3, "^SystemExit: 3$"),
        (StopIteration, "too early", "^StopIteration: too early$"),
    ],
)
def test_what_would_be_taken_for_something_else_is_told(started, capfd, kind, argument, message):
    workers = started(Squares(20, failing(kind, argument)), 2)
    assert [next(workers)[0] for _ in range(10)] == [number**2 for number in range(10)]
    with pytest.raises(RuntimeError, match=message):
        next(workers)
    assert capfd.readouterr() == ("", "")


class Held(Sequence):
    """Its third element cannot travel."""

    def __len__(self):
        return 20

    def __getitem__(self, number):
        return number if number != 2 else threading.Lock()


def test_an_element_that_cannot_travel_is_an_error_and_no_endless_wait(started):
    workers = started(Held(), 1)
    assert [next(workers), next(workers)] == [0, 1]
    with pytest.raises(TypeError, match="cannot pickle"):
        within(60, lambda: next(workers))


def within(seconds, act):
    """What ``act`` returns or raises in a thread, or queue.Empty where it waits for ever."""
    ends = queue.Queue()

    def run():
        try:
            ends.put((act(), None))
        except Exception as error:
            ends.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    value, error = ends.get(timeout=seconds)
    if error is not None:
        raise error
    return value


class Slow(Sequence):
    def __len__(self):
        return 20

    def __getitem__(self, number):
        time.sleep(1000)


@pytest.mark.parametrize("count", [1, 4])
def test_closing_while_another_thread_waits_is_told_there(started, count):
    workers = started(Slow(), count)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, workers)
        time.sleep(0.2)
        workers.close()
        with pytest.raises(DataError, match="the data workers were ended while a batch was made"):
            waiting.result(60)


def test_nothing_comes_after_closing(started):
    """Not even what was in a pipe already: how much that is depends on the moment."""
    workers = started(Squares(20), 2)
    next(workers)
    time.sleep(0.3)
    workers.close()
    with pytest.raises(DataError, match="the data workers were ended"):
        next(workers)


class Large(Squares):
    """More than a pipe holds goes to a worker when it starts."""

    def __init__(self):
        super().__init__(20)
        self.weight = b"x" * (1 << 20)


@pytest.fixture
def no_python():
    before = spawn.get_executable()
    spawn.set_executable("/bin/false")
    yield
    spawn.set_executable(before)


@pytest.mark.parametrize("elements", [Squares(20), Large()])
def test_a_worker_that_cannot_start_is_told(started, no_python, elements):
    with pytest.raises(DataError, match=r"data worker 1 of 2 .* ended with status 1: start again"):
        within(60, lambda: next(started(elements, 2)))


def test_where_the_second_cannot_start_the_first_ends(monkeypatch):
    begun, start = [], BaseProcess.start

    def limited(self):
        if begun:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        start(self)
        begun.append(self)

    monkeypatch.setattr(BaseProcess, "start", limited)
    with pytest.raises(OSError, match="Too many open files") as caught:
        Workers(Squares(10**9), 3)
    assert not alive(begun[0].pid)
    assert caught.value.errno == errno.EMFILE
    assert signal.SIGINT not in blocked()


def test_a_worker_ends_with_its_pipe_alone(started):
    """A sibling that held it too would keep the reader waiting when its worker dies."""
    workers = started(Squares(10**9), 3)
    processes = [next(workers)[1] for _ in range(3)]
    ends = [{os.readlink(p) for p in Path(f"/proc/{process}/fd").iterdir()} for process in processes]
    pipes = [os.readlink(f"/proc/self/fd/{pipe.fileno()}") for pipe in workers._pipes]
    assert [[pipe in end for end in ends] for pipe in pipes] == np.eye(3).tolist()


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


@pytest.mark.parametrize("status", [7, 0])
def test_a_worker_that_leaves_by_itself_is_told(started, status):
    told = rf"ended with status {status}: start again; data\.workers=0 reads the data without"
    with pytest.raises(DataError, match=told):
        list(started(Squares(20, functools.partial(os._exit, status)), 1))


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


BUSY = """
import sys, time
from stellarbyte_jax.data.workers import Workers
class Busy(list):
    def __len__(self):
        return 10
    def __getitem__(self, number):
        print("begun", flush=True)
        time.sleep(1000)
workers = Workers(Busy(), 2)
print(*(process.pid for process in workers._processes), flush=True)
next(workers)
"""


def test_workers_in_the_middle_of_an_element_end_with_a_killed_program():
    """They learn of it by themselves: nothing that they would send fails."""
    program = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None and program.stderr is not None
    with program:
        lines = [program.stdout.readline().split() for _ in range(3)]
        (processes,) = [line for line in lines if line != ["begun"]]
        program.kill()
        try:
            until(lambda: not any(alive(process) for process in processes), 60)
        finally:
            for process in filter(alive, processes):
                os.kill(int(process), signal.SIGKILL)
        assert "Traceback" not in program.stderr.read()


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


class Marked(Squares):
    """Each element leaves a file where it is made."""

    def __init__(self, folder, length, size):
        super().__init__(length, size=size)
        self.folder = folder

    def __getitem__(self, number):
        (self.folder / str(number)).touch()
        return super().__getitem__(number)


def test_large_elements_are_not_made_far_ahead(started, tmp_path):
    workers = started(Marked(tmp_path, 9, workers_module._LARGE), 1)
    until((tmp_path / "1").exists)
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == 2, "one that is being sent, one that waits"
    assert [square for square, *_ in workers] == [number**2 for number in range(9)]

"""Elements of a sequence, made in worker processes and handed out in order.

Each worker has a pipe of its own, and no lock or queue is shared: one that is killed in the middle of a message is the
end of its pipe, where readers of a queue would wait for the rest of the message for ever.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self

import cloudpickle

from stellarbyte_jax.data.files import DataError

_AHEAD = 4  # elements that a worker has ready besides those in its pipe
_LARGE = 1 << 24  # bytes of an element that waits until those before it are sent
_SIGNALS = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
_spawn = multiprocessing.get_context("spawn")


class _Remote(Exception):  # noqa: N818 (no error of its own)
    """Where in its process a worker raised an error, as text: a traceback cannot travel."""


class Workers:
    """Iterates over ``elements``, of which worker ``i`` of ``n`` makes every ``n``-th from ``i`` on.

    ``close()`` ends the workers; they end by themselves when this process dies.
    """

    def __init__(self, elements: Sequence[Any], count: int) -> None:
        """Starts ``count`` processes, which begin at once."""
        self._count = count
        self._length = len(elements)
        self._next = 0
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._ended = threading.Event()
        # With a priority, because daemons are otherwise told at exit to stop by a signal that they block.
        self.close = util.Finalize(self, _end, args=(self._processes, self._ended), exitpriority=1)
        pickled = cloudpickle.dumps(elements)
        try:
            with signals_blocked():
                orders = [self._start(index) for index in range(count)]
            for order in orders:
                with order, contextlib.suppress(OSError):  # of a worker that is gone, which __next__ tells
                    order.send_bytes(pickled)
        except BaseException:
            self.close()
            raise

    def _start(self, index: int) -> Connection:
        """Starts a worker; returns the pipe by which it learns what to do.

        As an argument of the process that could be more than the pipe of a start holds, and Python itself has its other
        end open: where the process ends before it reads, the writer would wait for ever.
        """
        receiver, sender = _spawn.Pipe(duplex=False)
        orders, order = _spawn.Pipe(duplex=False)
        # With another writer or reader left, a worker's death would not be the end of its pipes.
        with sender, orders:
            process = _spawn.Process(target=_work, args=(orders, index, self._count, sender), daemon=True)
            process.start()
        self._pipes.append(receiver)
        self._processes.append(process)
        return order

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next element.

        Raises:
          DataError: its worker is gone, or all were ended.
          Exception: what making it raised.
        """
        if self._next >= self._length:
            raise StopIteration
        index = self._next % self._count
        try:
            message = self._pipes[index].recv_bytes()
        except (EOFError, OSError):  # the latter in the middle of a message
            message = None
        if message is None or self._ended.is_set():
            raise DataError(self._loss(index))
        value, error, trace = pickle.loads(message)
        if error is not None:
            raise error from _Remote(trace)
        self._next += 1
        return value

    def _loss(self, index: int) -> str:
        if self._ended.is_set():
            return "the data workers were ended while a batch was made"
        process = self._processes[index]
        process.join(timeout=10)
        code = process.exitcode
        if code is None:
            how = "ended: start again"
        elif code >= 0:
            how = f"ended with status {code}: start again; data.workers=0 reads the data without workers"
        elif code == -signal.SIGKILL:
            how = "was killed, as the system does where memory runs out: free memory or lower data.workers, start again"
        else:
            how = f"was ended by {signal.Signals(-code).name}: start again"
        return f"data worker {index + 1} of {self._count} (process {process.pid}) {how}"


def _end(processes: list[BaseProcess], ended: threading.Event) -> None:
    ended.set()  # before: a thread that waits for an element is to know why none comes
    # Nothing that a worker holds needs an orderly end, and one that hangs ends too.
    for process in processes:
        process.kill()
    while processes:
        processes.pop().join(timeout=10)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside never see SIGINT, SIGTERM and SIGHUP: stopping is the parent's decision.

    Ignoring them in the worker would come too late: a signal during its start would print a traceback.
    """
    # Starting this helper process, which Python does with the first worker, would lift the block again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(orders: Connection, index: int, count: int, pipe: Connection) -> None:
    """Makes elements, some of them ahead of time."""
    # One thread a worker: the setting for how many cores are used is data.workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    ready: queue.Queue[memoryview | None] = queue.Queue(_AHEAD)
    sender = threading.Thread(target=_send, args=(ready, pipe), name="send", daemon=True)
    sender.start()
    try:
        with orders:
            elements = pickle.loads(orders.recv_bytes())
        for number in range(index, len(elements), count):
            message = ForkingPickler.dumps((elements[number], None, ""))
            if len(message) >= _LARGE:
                ready.join()
            ready.put(message)
    except BaseException as error:  # also those of libraries that are no Exception, such as a panic of Rust
        ready.put(ForkingPickler.dumps((None, _portable(error), traceback.format_exc())))
    ready.put(None)
    sender.join()


def _send(ready: queue.Queue[Any], pipe: Connection) -> None:
    while (message := ready.get()) is not None:
        try:
            pipe.send_bytes(message)
        except OSError:
            os._exit(1)  # nobody reads
        ready.task_done()


def _portable(error: BaseException) -> Exception:
    """The error, or one that says the same where it cannot travel or would mean something else to who iterates."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))
            if type(copy) is type(error) and str(copy) == str(error):
                return copy
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

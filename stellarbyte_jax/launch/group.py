"""The processes of a run as one group: values and errors go from one to the others, and none outlives another."""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

from stellarbyte_jax.command import MendableError, one_line, print_error
from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.launch.signals import NUMBERS, LeaveAt

Value = TypeVar("Value")

_BEAT_SECONDS, _SILENT_SECONDS, _LEAVE_SECONDS, _TELL_SECONDS = 1.0, 30.0, 10.0, 2.0
_GOES_ON = "the same command goes on from the last checkpoint"
# What libraries say in a process when another one is gone.
_OF_OTHERS = re.compile(r"gloo|nccl|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED|barrier", re.IGNORECASE)
_LAST_WORDS = """
import signal, socket, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
name, seconds = sys.argv[1:]
told = sys.stdin.read().split()
if not told:
    why = (f"did not find the other processes in {seconds} s: start all of them, with one --coordinator and the same "
        "--processes")
elif told[-1] != "done":
    address = told[-1].rpartition(":")
    try:
        socket.create_connection((address[0].strip("[]"), int(address[2])), timeout=5).close()
        why = "was killed, or crashed: what stands above tells more"
    except OSError:
        why = f"ended with process 0, which is gone: nothing listens on its {told[-1]} any more; see what it printed"
    why += "; the same command goes on from the last checkpoint"
if told[-1:] != ["done"]:
    print(f"error: {name}: {why}", file=sys.stderr, flush=True)
"""


class LastWords:
    """A small process that says in one line why this one ended, where it cannot: jax aborts it in a thread of its own.

    That happens where process 0 is gone, or processes do not find each other in time.
    """

    def __init__(self, name: str, seconds: float) -> None:
        """Takes the name of this process, and how long the others have to come."""
        command = [sys.executable, "-S", "-c", _LAST_WORDS, name, f"{seconds:.0f}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def joined(self, coordinator: str) -> None:
        """From now on, what ends this process is the end of another one."""
        self._tell(coordinator)

    def none(self) -> None:
        """This process has said, or will, why it ends."""
        self._tell("done")
        with contextlib.suppress(OSError, ValueError):
            self._process.communicate()

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()


class PeerError(MendableError):
    """Another process of the run failed or is gone.

    Attributes:
      code: the status with which this process ends for it.
    """

    def __init__(self, text: str, code: int = 1) -> None:
        """Takes the message."""
        super().__init__(text)
        self.code = code


class Group:
    """This process among others.

    Attributes:
      rank: its number.
      count: of processes.
    """

    def __init__(self, client: Any, rank: int, count: int, last_words: LastWords) -> None:
        """Takes the client of jax's coordination service."""
        self._client, self.rank, self.count = client, rank, count
        self._number = 0
        self._watching = threading.Event()
        self._failure: PeerError | None = None
        self._code: int | None = None
        self._last_words = last_words
        self._signals = LeaveAt(1, self.leave)
        self._handlers: dict[int, Any] = {}
        self._leaving = False
        atexit.register(self._leave)

    @classmethod
    def of_jax(cls, last_words: LastWords) -> Self | None:
        """The processes that ``jax.distributed`` joined; None where this one is alone."""
        from jax._src.distributed import global_state as state  # orbax and flax take the client from there too

        if state.num_processes == 1 or state.client is None:
            last_words.none()
            return None
        last_words.joined(state.coordinator_address or ":0")
        return cls(state.client, state.process_id, state.num_processes, last_words)

    @property
    def name(self) -> str:
        """How messages call this process."""
        return f"process {self.rank} of {self.count}"

    def from_main(self, make: Callable[[], Value]) -> Value:
        """See :func:`processes.from_main`."""
        key = self._next("value")
        if self.rank == 0:
            value = make()
            self._client.key_value_set(key, json.dumps(value))
            return value
        return json.loads(self._poll(lambda: self._try_get(key)))

    def wait_for_all(self) -> None:
        """See :func:`processes.wait_for_all`."""
        self.first_error(None)

    def first_error(self, error: Exception | None) -> Exception | None:
        """See :func:`processes.first_error`."""
        key = self._next("reached")
        self._client.key_value_set(f"{key}/{self.rank}", "" if error is None else one_line(str(error)))

        def gathered() -> str | None:
            found = self._entries(key)
            if len(found) < self.count:
                return None
            wrong = [f"process {rank}: {text}" for rank, text in sorted(found.items()) if text]
            return json.dumps(wrong[0] if wrong else None)

        text = self.from_main(lambda: json.loads(self._poll(gathered)))
        return error if error is not None else None if text is None else OSError(text)

    def end(self) -> None:
        """Returns when all processes are done."""
        self.wait_for_all()
        self._watching.set()
        self._signals.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        self.wait_for_all()

    def watch(self) -> None:
        """Begins to tell the others that this process is alive, and to look whether they are."""
        threading.Thread(target=self._watch, name="processes", daemon=True).start()

    def leave_at_signals(self) -> None:
        """From now to the end a signal that nobody handles ends this process as :meth:`leave` does."""
        if threading.current_thread() is not threading.main_thread():
            return
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        numbers = [number for number in NUMBERS if signal.getsignal(number) in defaults]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._signals.start(numbers)

    def leave(self, number: int, which: str = "") -> None:
        """See :func:`processes.leave`. The main process, which the others need, waits until they left."""
        code, why = 128 + number, f"left at {which}{signal.Signals(number).name}"
        if not self._watching.is_set():
            self._leaving = True
            self._watching.set()
            os.write(2, f"\nerror: {self.name} {why}; {_GOES_ON}\n".encode())
            telling = threading.Thread(target=self._tell_left, args=(f"{code} {why}",), daemon=True)
            telling.start()  # process 0 may not answer
            telling.join(_LEAVE_SECONDS if self.rank == 0 else _TELL_SECONDS)
        self._last_words.none()
        os._exit(code)

    def _wait_if_leaving(self) -> None:
        """What the main thread makes of the end of the others is nobody's business where this process leaves."""
        while self._leaving:
            time.sleep(_BEAT_SECONDS)

    def _tell_left(self, text: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"left/{self.rank}", text)
            self._goodbye()

    def fail(self, error: BaseException) -> None:
        """Tells the others of an error that ends this process; the main one, which they need, waits until they left."""
        self._wait_if_leaving()
        if self._code is not None:
            return
        if not isinstance(error, PeerError) and _OF_OTHERS.search(str(error)):
            self._watching.wait(_SILENT_SECONDS + 2 * _LEAVE_SECONDS)  # the watch finds out who, and ends this process
        self._watching.set()
        self._code = _status(error)
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"failed/{self.rank}", one_line(str(error) or type(error).__name__))
            self._goodbye()

    def _watch(self) -> None:
        seen: dict[int, tuple[str, float]] = {rank: ("", time.monotonic()) for rank in range(self.count)}
        beat = 0
        while not self._watching.wait(_BEAT_SECONDS):
            beat += 1
            try:
                self._client.key_value_set(f"beat/{self.rank}", str(beat), allow_overwrite=True)
                beats, failed, left = (self._entries(folder) for folder in ("beat", "failed", "left"))
            except Exception:  # process 0 is gone, and jax ends this one
                continue
            now = time.monotonic()
            for rank, text in beats.items():
                if text != seen[rank][0]:
                    seen[rank] = (text, now)
            silent = [rank for rank, (_, since) in seen.items() if now - since > _SILENT_SECONDS and rank != self.rank]
            if left:
                rank = min(left)
                code, _, why = left[rank].partition(" ")
                self._end_with(PeerError(f"process {rank} of {self.count} {why}; {_GOES_ON}", int(code)))
            elif failed:
                rank = min(failed)
                self._end_with(PeerError(f"process {rank} of {self.count} failed: {failed[rank]}"))
            elif silent:
                self._end_with(
                    PeerError(
                        f"process {silent[0]} of {self.count} is gone (no sign of life for {_SILENT_SECONDS:.0f} s): "
                        f"it was killed, or its machine or network stopped; {_GOES_ON}"
                    )
                )

    def _end_with(self, error: PeerError) -> None:
        self._failure = error
        if self._watching.wait(2 * _BEAT_SECONDS) or self._code is not None:  # the main thread saw it, and ends
            return
        print_error(error)
        with contextlib.suppress(Exception):
            self._goodbye()
        self._code = error.code
        self._leave()

    def _goodbye(self) -> None:
        """Says that this process leaves. The main one waits until all others said so: without it, jax aborts them."""
        self._client.key_value_set(f"gone/{self.rank}", "", allow_overwrite=True)
        end = time.monotonic() + _LEAVE_SECONDS
        while self.rank == 0 and time.monotonic() < end and len(self._entries("gone")) < self.count:
            time.sleep(0.1)

    def _leave(self) -> None:
        """The end of the program; after a failure at once, since jax would wait for the others."""
        self._wait_if_leaving()
        self._last_words.none()
        if self._code is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(self._code)

    def _next(self, kind: str) -> str:
        self._number += 1
        return f"{kind}/{self._number}"

    def _try_get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _entries(self, folder: str) -> dict[int, str]:
        """The values of a folder by rank."""
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"{folder}/")}

    def _poll(self, find: Callable[[], str | None]) -> str:
        """Waits in Python, where signals arrive."""
        pause = 0.001
        while (found := find()) is None:
            if self._failure is not None:
                raise self._failure
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return found


current: Group | None = None


def _status(error: BaseException) -> int:
    """What the program returns after this error, as :func:`command.command` does."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, PeerError):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ConfigError) else 1


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Within it, an error of one process ends all of them."""
    try:
        yield
    except BaseException as error:
        if current is not None:
            current.fail(error)
        raise


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Likewise; ends when all processes have come to its end, and from then on each may end alone."""
    with failing_together():
        yield
        if current is not None:
            current.end()

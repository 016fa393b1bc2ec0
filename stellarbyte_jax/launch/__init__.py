"""Starting up: a line about the environment, and signals.

jax is imported where it is used: the doctor is to say why it cannot be, and comes through this file.
"""

import contextlib
import fcntl
import logging
import os
import platform
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import CoroutineType, FrameType
from typing import Self

from stellarbyte_jax.command import remedy
from stellarbyte_jax.interrupts import KeepingInterrupts
from stellarbyte_jax.launch.signals import NUMBERS, LeaveAt


def quiet_libraries() -> None:
    """Keeps orbax's and grain's notes to themselves off the console.

    What goes wrong in them reaches the program as an exception; they would print it, with its traceback, once more
    for each array of a checkpoint.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # No coroutine is ours: these are those that orbax made for an event loop which could not be opened.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    threading.excepthook = _without_orbax
    sys.unraisablehook = KeepingInterrupts(_without_abandoned_reads)


def _without_orbax(failure: threading.ExceptHookArgs) -> None:
    if not type(failure.thread).__module__.startswith("orbax."):
        threading.__excepthook__(failure)


def _without_abandoned_reads(failure: "sys.UnraisableHookArgs") -> None:
    """Where one array of a checkpoint cannot be read or written, orbax leaves the others to themselves.

    Their reads go to the garbage collector, and tensorstore tells of them to an event loop that is closed. One that
    could not be opened, for want of files, fails once more when it goes there.
    """
    abandoned = isinstance(failure.object, CoroutineType) and "orbax" in failure.object.cr_code.co_filename
    half_made = getattr(failure.object, "__qualname__", None) == "BaseEventLoop.__del__"
    if not abandoned and not half_made and str(failure.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(failure)


def environment_facts() -> dict[str, str | int]:
    """What a run stands on: versions, cores and devices, by name."""
    import jax

    devices = jax.devices()
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count() or 0,
        "device": devices[0].device_kind,
        "devices": len(devices),
    }


def environment() -> str:
    """One line on what the run stands on."""
    import jax

    devices = jax.devices()
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return (
        f"jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPU cores, "
        f"device {count}{devices[0].device_kind}"
    )


def write_failure(path: Path, error: OSError) -> OSError:
    """The error of a write, with the file's name and what to do."""
    return OSError(
        f"{path} could not be written: {error.strerror or error}; {remedy(error) or 'mend that'}, start again"
    )


class Interrupt:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag that the loop reads; a second one leaves at once.

    What comes within a second of the first is the same one, which a wrapper passed on.

    Python lets the main thread alone handle signals: in another one they do what they did before.
    """

    def __init__(self) -> None:
        """Installs nothing yet: use it as a context manager."""
        self._previous: dict[int, object] = {}
        self._second = LeaveAt(2, self._leave)
        self.received: int | None = None

    @property
    def signal(self) -> int | None:
        """The signal that the run acts on."""
        return self.received

    def agree(self) -> None:
        """Asks the other processes, where there are any; a run calls it once a step."""

    @property
    def exit_code(self) -> int:
        """What launchers expect of a process ended by this signal: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 0 if self.signal is None else 128 + self.signal

    def came(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:  # the second one is not left to this thread, which may be outside of Python
            return
        self.received = number
        name = signal.Signals(number).name
        text = f"\n{name}: saving a checkpoint after this step, then leaving; a second signal leaves at once\n"
        self._told(text)

    def _leave(self, number: int) -> None:
        os._exit(128 + number)

    def _told(self, text: str) -> None:
        os.write(1, text.encode())  # print would fail where the signal came in the middle of another print

    def __enter__(self) -> Self:
        """Installs the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in NUMBERS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run is to outlive its terminal
            self._previous[number] = signal.signal(number, self._handle)
        self._second.start(self._previous)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the earlier handlers back."""
        self._second.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


LOCK = "run.lock"  # in the run's directory
LOCKS_ADVICE = "mount it with locks (Lustre: -o flock; NFS: version 4), or choose another output_dir"
_SEEN_SECONDS = 30  # in which a file of another machine appears on a file system over the network


class InUseError(OSError):
    """Another process trains in the directory, which is its own."""


class RunLock:
    """Keeps two processes from training in one directory; released when the process ends, however it does."""

    def __init__(self, directory: Path) -> None:
        """Names the directory: use it as a context manager."""
        self._directory = directory
        self._path = directory / LOCK

    def __enter__(self) -> Self:
        """Takes the lock.

        Raises:
          InUseError: another process has it.
          OSError: the file system has no locks.
        """
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                raise BlockingIOError  # it was removed before it was locked, and another process made it anew
        except (BlockingIOError, FileNotFoundError):
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise InUseError(
                f"{self._path.parent} is in use by {owner}: wait until it ends, stop it, or choose another output_dir"
            ) from None
        except OSError as error:
            with contextlib.suppress(OSError):
                if os.fstat(self._file.fileno()).st_size == 0:
                    self._path.unlink()
            self._file.close()
            raise OSError(f"{self._directory} takes no locks: {error.strerror or error}; {LOCKS_ADVICE}") from error
        self._opened = os.open(self._directory, os.O_RDONLY)  # so that no other one gets its number
        self._file.truncate(0)
        self._file.write(f"{self.owner()}\n")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        """Gives it back."""
        os.close(self._opened)
        self._file.truncate(0)
        self._file.close()

    def owner(self) -> str:
        """What the file says as long as this process has the lock."""
        return f"process {os.getpid()} on {platform.node()}"

    def see(self, owner: str) -> None:
        """Raises OSError where this process does not see that ``owner`` has the lock: it has another directory."""
        end = time.monotonic() + _SEEN_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if self._path.read_text(encoding="utf-8").strip() == owner:
                    return
            time.sleep(0.1)
        raise OSError(
            f"output_dir {self._directory} on {platform.node()} is not the directory that {owner} writes to: name one "
            "on a file system that all processes share, by a path that is the same on all machines"
        )

    def check(self) -> None:
        """Raises OSError where the directory was moved or removed: what is written now would make half of it anew."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._directory), os.fstat(self._opened)):
                return
        raise OSError(f"{self._directory} is no longer there: {remedy(FileNotFoundError('No such file'))}, start again")

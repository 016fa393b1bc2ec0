"""Measurements as processes of their own, which end with the command."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_POLL_SECONDS = 0.05
OUT_OF_MEMORY = "out of memory"  # the error of a worker whose device was too small


def run_worker(
    words: Sequence[str],
    *,
    processes: int = 1,
    limit: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs ``stellarbyte benchmark`` with these arguments in a process of its own, and waits for its result.

    Args:
      words: arguments, ``--worker`` among them.
      processes: more than one: so many with the same arguments, numbered for ``torch.distributed``; the first one's
        result counts.
      limit: seconds after which they are killed, with all processes that they started; None: none.
      environment: variables that go before those of this process.

    Returns:
      What the worker measured, or ``error``: an exit code, or the limit. What went wrong stands on standard error.
    """
    command = [sys.executable, "-m", "stellarbyte_jax", "benchmark", *words]
    base = {**os.environ, **(environment or {})}
    started: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, _ended(started):
        for variables in ranks(processes) if processes > 1 else [{}]:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if started else output,
                text=True,
                env={**base, **variables},
                process_group=started[0].pid if started else 0,
            )
            started.append(process)
        error = _wait(started, limit)
        output.seek(0)
        return {"error": error} if error else _result(output.read())


def ranks(processes: int) -> list[dict[str, str]]:
    """Variables that tell each process of ``torch.distributed`` who it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    return [{**at, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _wait(started: Sequence[subprocess.Popen[str]], limit: float | None) -> str | None:
    """Waits until all have ended; what went wrong as soon as one failed or time is up, else None."""
    end = None if limit is None else time.monotonic() + limit
    while True:
        codes = [process.poll() for process in started]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return f"exit code {failed}"
        if None not in codes:
            return None
        if end is not None and time.monotonic() > end:
            return f"killed after {limit:g} s (--limit)"
        time.sleep(_POLL_SECONDS)


def _result(printed: str) -> dict[str, Any]:
    for line in printed.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": "exit code 0, and no result"}


@contextlib.contextmanager
def _ended(started: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """However the block is left, these processes and theirs are killed: one that stays would keep its GPU."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, _leave)
    try:
        yield
    finally:
        if started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started[0].pid, signal.SIGKILL)
        for process in started:
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(number: int, frame: object) -> None:
    del frame
    raise SystemExit(128 + number)

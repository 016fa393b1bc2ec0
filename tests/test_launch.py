"""What belongs to a process: its lock on a run, and what signals do to it."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from helpers.processes import until

from stellarbyte_jax import launch
from stellarbyte_jax.command import remedy
from stellarbyte_jax.launch import (
    Interrupt,
    RunLock,
    _without_abandoned_reads,
    signals,
    write_failure,
)

HOLD = """
import sys, time
from pathlib import Path
from stellarbyte_jax.launch import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_has_one_process(tmp_path):
    with RunLock(tmp_path):
        message = (
            rf"{tmp_path} is in use by process {os.getpid()} on {platform.node()}: wait until it ends, stop it, or"
        )
        with pytest.raises(OSError, match=message), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=f"in use by process {holder.pid} on"), RunLock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RunLock(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path, monkeypatch, made_anew):
    """A start that fails removes its lock; who had it open would share the directory with whoever makes it anew."""
    take = fcntl.flock

    def late(file, how):
        (tmp_path / "run.lock").unlink()
        if made_anew:
            (tmp_path / "run.lock").touch()
        take(file, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(OSError, match="in use by another process: wait"), RunLock(tmp_path):
            pytest.fail("two processes would have a lock each")
    with RunLock(tmp_path):
        pass


NO_HOME = """
import os, pwd
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown  # a user of a container who has a number alone
del os.environ["HOME"]
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
import jax
from pathlib import Path
from stellarbyte_jax.data.files import DataError
from stellarbyte_jax.data.sources import cache_path
from stellarbyte_jax.launch.compile_cache import CompileCache
from stellarbyte_jax.launch.doctor.places import existing
from stellarbyte_jax.training.begin import _check_place
CompileCache()
_check_place(Path("/not/there"))
print(jax.config.values["jax_compilation_cache_dir"], cache_path("/a"), existing(Path("~/a")) == Path.cwd())
try:
    cache_path(None)
except DataError as error:
    print(error)
"""


def test_a_user_without_a_home_directory_has_no_cache_there():
    done = subprocess.run([sys.executable, "-c", NO_HOME], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "None /a True",
        "data.cache_dir: this user has no home directory to keep caches in: name a folder, or set HOME",
    ], done.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_left_as_it_was(tmp_path, monkeypatch, number):
    """Lustre without -o flock."""

    def none(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    told = rf"{tmp_path} takes no locks: {os.strerror(number)}; mount it with locks .* or choose another output_dir"
    with pytest.raises(OSError, match=told), RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_that_sees_another_owner_has_another_directory(tmp_path, monkeypatch):
    """On its own disk, where an earlier run was killed."""
    monkeypatch.setattr(launch, "_SEEN_SECONDS", 0.3)
    with RunLock(tmp_path) as lock:
        RunLock(tmp_path).see(lock.owner())
        with pytest.raises(OSError, match=f"output_dir {tmp_path} on .* is not the directory that process 9 on b"):
            RunLock(tmp_path).see("process 9 on b")


def test_a_lock_that_was_given_back_names_nobody(tmp_path):
    with RunLock(tmp_path):
        pass
    assert (tmp_path / "run.lock").read_text() == ""


@pytest.mark.parametrize("made_again", [False, True])
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_directory_that_is_another_one_now_is_no_place_for_a_run(tmp_path, how, made_again):
    run = tmp_path / "run"
    run.mkdir()
    with RunLock(run) as lock:
        lock.check()
        assert (run / "run.lock").read_text().startswith(f"process {os.getpid()} on")
        (run / "run.lock").unlink()
        lock.check()
        run.rename(tmp_path / "moved") if how == "moved" else run.rmdir()
        if made_again:
            run.mkdir()
        with pytest.raises(OSError, match=r"run is no longer there: the directory was moved or removed during the run"):
            lock.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_flag(number, capfd):
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with Interrupt() as interrupt:
            assert interrupt.exit_code == 0
            os.kill(os.getpid(), number)
            assert (interrupt.signal, interrupt.exit_code) == (number, 128 + number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    assert f"{signal.Signals(number).name}: saving a checkpoint after this step" in capfd.readouterr().out


IN_XLA = """
import hashlib, os, sys
from stellarbyte_jax.launch import Interrupt
if sys.argv[1] == "fork":
    interrupt = Interrupt()
    interrupt.__enter__()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), 15)
            os._exit(0)
        os.waitpid(child, 0)
    print("there", flush=True)
    os._exit(0)
with Interrupt():
    print("there", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # runs no Python, as a collective that never ends
"""


def test_a_second_signal_ends_a_process_that_runs_no_python():
    process = subprocess.Popen([sys.executable, "-c", IN_XLA, ""], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_twice_at_once_is_one(second, monkeypatch):
    """To all processes of a job, and once more from a wrapper that passes its own on."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(signals, "_SAME_SECONDS", 0.5)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        os.kill(os.getpid(), second)
        time.sleep(0.1)
        assert (interrupt.signal, left) == (signal.SIGTERM, [])
        time.sleep(0.5)
        os.kill(os.getpid(), second)
        until(lambda: left, 60)
    assert left == [128 + second]


def test_who_listened_before_a_run_listens_again_after_it():
    """As the group of a process's run does, which ends the others."""
    heard = []
    outer = signals.LeaveAt(1, heard.append)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        outer.start([signal.SIGTERM])
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.signal == signal.SIGTERM and not heard
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: heard, 2)
    finally:
        outer.stop()
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_signals_of_children_are_not_counted():
    done = subprocess.run([sys.executable, "-c", IN_XLA, "fork"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("there\n"), done.stderr


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_reads_that_orbax_abandoned_fail_without_a_word(monkeypatch):
    """A coroutine of its files; another one, or anything else, is told as ever."""
    told, made = [], []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    for file in ("/x/orbax/checkpoint/read.py", "/x/ours.py"):
        scope = {}
        exec(compile("async def read(): pass", file, "exec"), scope)
        made.append(scope["read"]())
    for thing in (*made, "a string"):
        _without_abandoned_reads(types.SimpleNamespace(object=thing, exc_value=RuntimeError("any")))
    _without_abandoned_reads(types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed")))
    assert [failure.object for failure in told] == [made[1], "a string"]
    for coroutine in made:
        coroutine.close()


NO_FILES = """
import asyncio, resource
from stellarbyte_jax.launch import quiet_libraries
async def write():
    pass
quiet_libraries()
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
coroutine = write()
try:
    asyncio.new_event_loop()
except OSError as error:
    print(error.strerror)
del coroutine
"""


def test_an_event_loop_that_cannot_be_opened_is_one_error():
    """Neither the half of it nor the coroutines that were made for it say more."""
    done = subprocess.run([sys.executable, "-c", NO_FILES], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{os.strerror(errno.EMFILE)}\n", "")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.ENOENT, "moved or removed"),
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "make it writable"),
    ],
)
def test_a_failed_write_is_told_with_what_helps(number, advice, tmp_path):
    """Whether the system's error comes itself, as a cause, or as words in a library's error."""
    error = OSError(number, os.strerror(number))
    wrapped = ValueError("a library failed")
    wrapped.__cause__ = error
    for form in (error, wrapped, ValueError(f"INTERNAL: [{os.strerror(number)}]")):
        assert advice in (remedy(form) or "")
    message = str(write_failure(tmp_path / "train.log", error))
    assert advice in message and "train.log" in message and os.strerror(number) in message
    assert remedy(ValueError("something else")) is None
    assert "cache_dir" not in remedy(error) and "output_dir" not in remedy(error, "cache_dir")


def test_signals_are_the_main_threads():
    before = signal.getsignal(signal.SIGINT)
    entered = []

    def act():
        with Interrupt() as interrupt:
            entered.append((interrupt.exit_code, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert entered == [(0, before)]

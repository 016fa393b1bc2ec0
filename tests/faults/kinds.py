"""The faults. Each function hits one run; what it returns False for cannot be done on this machine."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time

from stellarbyte_jax.training.console import OUTPUT_CLOSED

from .program import STEPS, documents

KINDS = {}
MOMENTS = ("start", "compile", "step", "step", "save", "end", "export")
_NO_ROOM = ("limit on the size of a file",)
_FULL = ("No space left", "disk is full", "MiB are free")
_FILES = ("Too many open files", "limit on open files")
# jax warns of programs that it cannot take from its cache, and compiles them; where XLA cannot read /proc/cpuinfo, its
# first program fails with an error that names no file and no limit.
_FILES_OF_XLA = (
    *("persistent compilation cache entry", "warnings.warn(", "Error in cpuinfo", "Failed to initialize cpuinfo"),
    *("XNNPACK/ynnpack", "INTERNAL: YNNPACK operation failed"),
)
_LOST = ("data worker", "No such file", "was removed", "does not exist", "moved or removed")


def kind(name):
    def register(act):
        KINDS[name] = act
        return act

    return register


@kind("kill")
def _kill(round):
    program = round.start()
    if round.at(program, *MOMENTS):
        program.send(signal.SIGKILL, group=False)
    round.ended(program, -9)


def _signal(round, number):
    program = round.start()
    group = round.draw.random() < 0.5  # as a terminal does
    if round.at(program, *MOMENTS):
        program.send(number, group)
    status = program.wait()
    # Before the handlers are there, and after the run, the signal ends the program as it ends any other.
    handled = "saving a checkpoint" in program.out
    round.ended(program, 128 + number if handled else -number)
    if handled and status == 128 + number and "stopped at step" not in program.out:
        round.problems.append("does not say at which step it stopped")


@kind("SIGTERM")
def _term(round):
    _signal(round, signal.SIGTERM)


@kind("SIGINT")
def _interrupt(round):
    _signal(round, signal.SIGINT)


@kind("SIGHUP")
def _hangup(round):
    _signal(round, signal.SIGHUP)


@kind("a second signal")
def _twice(round):
    program = round.start()
    first, second = (round.draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)) for _ in range(2))
    if round.at(program, "compile", "step", "save", "end"):
        program.send(first)
        program.until(lambda: "saving a checkpoint" in program.out)
        time.sleep(round.draw.choice((0, 1.1)))  # within a second it is the first one once more
        program.send(second)
    round.ended(program, 128 + first, 128 + second, -second)


@kind("a worker killed")
def _worker(round):
    round.place.workers = 2
    round.place.write_config(round.place.run)
    program = round.start()
    if round.at(program, "compile", "step", "step", "save", "end"):
        children = program.children()
        for child in round.draw.sample(children, min(len(children), round.draw.randint(1, 2))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    round.ended(program, 1, error=("data worker",))


def _stopped_after_two(round):
    """A killed run with two checkpoints at least; returns the folder of the newest."""
    program = round.start()
    program.until(lambda: (round.place.run / "checkpoints" / "10").exists())
    round.at(program, "step", "save")
    program.send(signal.SIGKILL)
    round.ended(program, -9)
    steps = [p for p in (round.place.run / "checkpoints").iterdir() if p.name.isdigit()]
    return max(steps, key=lambda p: int(p.name))


def _some_file(round, folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    chosen = round.draw.choice(files)
    round.did.append(str(chosen.relative_to(folder.parent)))
    return chosen


@kind("a bit flipped")
def _flip(round):
    file = _some_file(round, _stopped_after_two(round))
    content = bytearray(file.read_bytes())
    if content:
        content[round.draw.randrange(len(content))] ^= 1 << round.draw.randrange(8)
    file.write_bytes(content)


@kind("a file cut")
def _cut(round):
    file = _some_file(round, _stopped_after_two(round))
    content = file.read_bytes()
    file.write_bytes(content[: round.draw.randrange(len(content) or 1)])


@kind("a file removed")
def _removed(round):
    _some_file(round, _stopped_after_two(round)).unlink()


@kind("a checkpoint emptied")
def _emptied(round):
    folder = _stopped_after_two(round)
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@kind("two at once")
def _two(round):
    first = round.start()
    if round.draw.random() < 0.5:
        round.at(first, "start", "compile", "step", "end")
    second = round.start()
    statuses = sorted(str(program.wait()) for program in (first, second))
    for program in (first, second):
        round.ended(program, 1, error=("is in use by",))
    if "0" not in statuses:
        round.problems.append(f"neither of two came to its end: {statuses}")


@kind("data cut")
def _data_cut(round):
    train = round.place.train
    before, times = train.read_bytes(), train.stat()
    program = round.start()
    if round.at(program, "compile", "step", "save"):
        train.write_bytes(before[: round.draw.randrange(len(before) // 2)])
    round.ended(program, 1, error=(f"{train} became shorter",))
    if not round.complete:
        # Without a checkpoint nothing is known of the data before, and what is left of a line is a bad one.
        kept = any(p.name.isdigit() for p in (round.place.run / "checkpoints").glob("*"))
        names = ("other content", "documents was", f"{train}:1:") if kept else (f"{train}:",)
        round.ended(round.start(), 1, error=(f"{train} is empty", *names), zero=False)
    train.write_bytes(before)
    os.utime(train, ns=(times.st_atime_ns, times.st_mtime_ns))


@kind("other data")
def _data_other(round):
    train = round.place.train
    before = train.read_bytes()
    program = round.start()
    if round.at(program, "step", "save"):
        program.send(signal.SIGTERM)
    round.ended(program, 128 + signal.SIGTERM)
    if not round.complete:
        train.write_text(documents(3, 800))
        # Nothing is read any more where the last step is kept.
        whole = (round.place.run / "checkpoints" / str(STEPS)).exists()
        round.ended(round.start(), 1, error=("other content",), zero=whole)
        train.write_bytes(before)


@kind("a limit on files' size")
def _file_size(round):
    program = round.start()
    if round.at(program, *MOMENTS):
        size = round.draw.choice((1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18))
        round.did.append(f"{size} bytes")
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (size, size))
    round.ended(program, 1, error=_NO_ROOM)


@kind("a limit on open files")
def _open_files(round):
    program = round.start()
    if round.at(program, "start", "compile", "step", "save", "end"):
        with contextlib.suppress(OSError):
            count = len(os.listdir(f"/proc/{program.pid}/fd")) + round.draw.randint(-2, 12)
            round.did.append(f"{count} files")
            resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (count, count))
    round.ended(program, 1, error=_FILES, foreign=_FILES_OF_XLA)


@kind("a full disk")
def _full(round):
    disk = round.place.folder / "disk"
    disk.mkdir()
    size = round.draw.randint(100, 6000)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        return False
    round.at_end(lambda: subprocess.run(["umount", "-l", disk], capture_output=True, check=False))
    round.did.append(f"{size} KiB")
    round.place.write_config(disk / "run")
    round.ended(round.start(), 1, error=_FULL)
    subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
    return True


@kind("stdout closed")
def _head(round):
    reader, writer = os.pipe()
    program = round.start(stdout=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        for _ in range(round.draw.choice((0, 1, 20))):
            lines.readline()
    round.ended(program, told=OUTPUT_CLOSED)


@kind("stopped for a while")
def _stop(round):
    program = round.start()
    if round.at(program, *MOMENTS):
        program.send(signal.SIGSTOP, group=True)
        time.sleep(round.draw.uniform(0.3, 3))
        program.send(signal.SIGCONT, group=True)
    round.ended(program)


@kind("output removed")
def _output_removed(round):
    program = round.start()
    if round.at(program, "compile", "step", "save", "end"):
        round.place.run.rename(moved := round.place.folder / "moved")
        round.ended(program, 1, error=_LOST, complete=False)
        # One that says with 0 that all is done had nothing left to write: the whole run is where the folder went.
        if program.process.returncode == 0:
            round.finished(moved)
            round.problems += [f"made again: {p.name}" for p in round.place.run.glob("*")]
        # What was written between the fault and its discovery is of no use; the user begins again.
        shutil.rmtree(round.place.run, ignore_errors=True)
    else:
        round.ended(program)


@kind("output read-only")
def _read_only(round):
    if os.geteuid() == 0:
        return False
    program = round.start()
    if round.at(program, "compile", "step", "save", "end"):
        for folder in (round.place.run, round.place.run / "checkpoints"):
            folder.chmod(0o500)
    round.ended(program, 1, error=("Permission denied",))
    for folder in (round.place.run, round.place.run / "checkpoints"):
        folder.chmod(0o700)
    return True


@kind("killed while exporting")
def _export(round):
    program = round.start()
    if round.at(program, "export", "end"):
        program.send(signal.SIGKILL, group=True)
    round.ended(program, -9)


NOT_HERE = {"the clock set apart": "needs libfaketime"}

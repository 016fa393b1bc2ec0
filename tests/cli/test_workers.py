"""Measurements in processes of their own: what they return, and that none of them is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import alive, until

from stellarbyte_jax.cli import workers


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Makes of the worker a program of its own; returns the environment that runs it instead of the package."""

    def make(text):
        package = tmp_path / "stellarbyte_jax"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        return {"PYTHONPATH": str(tmp_path)}

    return make


# Starts a process that would sleep for long, and writes its number and its own.
SLEEPS = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
name = "numbers" + os.environ.get("RANK", "")
new = pathlib.Path(name + ".new")
new.write_text(f"{os.getpid()} {child.pid}")
new.rename(name)
time.sleep(600)
"""


def started(rank="") -> list[str]:
    return Path(f"numbers{rank}").read_text().split()


def gone(numbers):
    return not any(alive(number) for number in numbers)


def test_a_worker_gives_its_result_and_reads_no_keyboard(program):
    environment = program(
        "import json, os, sys\n"
        "print('a note')\n"
        "leads = os.getpgid(0) == os.getpid()\n"
        "print('RESULT', json.dumps([sys.argv[1:], sys.stdin.read(), os.environ['MORE'], leads]))"
    )
    Path("typed").write_text("what was typed")
    kept, typed = os.dup(0), os.open("typed", os.O_RDONLY)
    try:
        os.dup2(typed, 0)
        found = workers.run_worker(["data", "--worker", "x"], environment={**environment, "MORE": "1"})
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(typed)
    assert found == [["benchmark", "data", "--worker", "x"], "", "1", True]


@pytest.mark.parametrize(("text", "error"), [("exit(3)", "exit code 3"), ("", "exit code 0, and no result")])
def test_a_worker_without_a_result_is_an_error(text, error, program):
    assert workers.run_worker([], environment=program(text)) == {"error": error}


def test_past_its_limit_a_worker_is_killed_with_what_it_started(program, monkeypatch):
    environment = program(SLEEPS)
    seconds = iter([0.0])
    with monkeypatch.context() as patch:
        patch.setattr(workers.time, "monotonic", lambda: next(seconds, 10.5 if Path("numbers").exists() else 9.0))
        assert workers.run_worker([], limit=10, environment=environment) == {"error": "killed after 10 s (--limit)"}
    until(lambda: gone(started()))


def test_processes_that_measure_together_know_each_other(program):
    environment = program(
        "import json, os, pathlib, time\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "mine = {name: os.environ[name] for name in names}\n"
        "pathlib.Path('new' + mine['RANK']).write_text(json.dumps(mine))\n"
        "os.rename('new' + mine['RANK'], 'rank' + mine['RANK'])\n"
        "while not os.path.exists('rank' + str(1 - int(mine['RANK']))): time.sleep(0.01)\n"
        "other = json.loads(pathlib.Path('rank' + str(1 - int(mine['RANK']))).read_text())\n"
        "print('RESULT', json.dumps([mine, other]))"
    )
    first, second = workers.run_worker([], processes=2, environment=environment)
    assert [first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]] == ["0", "0", "1", "1"]
    assert first["WORLD_SIZE"] == "2" and first["MASTER_PORT"] == second["MASTER_PORT"]


def test_where_one_of_them_fails_the_others_do_not_wait_for_it(program):
    environment = program("import os\nif os.environ['RANK'] == '1': exit(5)\n" + SLEEPS)
    assert workers.run_worker([], processes=2, environment=environment) == {"error": "exit code 5"}
    if Path("numbers0").exists():
        until(lambda: gone(started(0)))


def test_what_any_of_them_started_is_killed_with_it(program):
    """The first one fails when the second has started a process of its own."""
    wait = (
        "import os, time\nif os.environ['RANK'] == '0':\n    while not os.path.exists('numbers1'): time.sleep(0.01)\n"
    )
    environment = program(wait + "    exit(5)\n" + SLEEPS)
    assert workers.run_worker([], processes=2, environment=environment) == {"error": "exit code 5"}
    until(lambda: gone(started(1)))


def test_nohup_and_the_handlers_of_before_stay():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ends = signal.getsignal(signal.SIGTERM)
    try:
        with workers._ended([]):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) != ends
        assert signal.getsignal(signal.SIGTERM) == ends
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_worker_outlives_the_command(number, program):
    environment = program(SLEEPS)
    # A shell that runs the tests in the background has its children ignore SIGINT.
    command = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from stellarbyte_jax.cli import workers; workers.run_worker([], environment={environment!r})"
    )
    source = str(Path(workers.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", command], env={**os.environ, "PYTHONPATH": source}, stderr=subprocess.DEVNULL
    )
    until(Path("numbers").exists)
    process.send_signal(number)
    assert process.wait(60) in (-signal.SIGINT, 128 + number)
    until(lambda: gone(started()))
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)

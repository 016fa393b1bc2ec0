"""A few rounds of `make faults`, and that what must hold can fail."""

import fcntl
import json
import os
import shutil

import pytest

from .invariants import Reference, of_ended, of_finished
from .kinds import KINDS
from .program import STEPS, Place
from .rounds import plain_signals, run_faults


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One for all processes of xdist, which share the uninterrupted run and its compiled programs."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def finished(folder):
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run, done = folder / "reference" / "run", folder / "done"
        if not done.exists():
            program = Place(folder / "reference", folder / "xla").start()
            assert (program.wait(), program.err) == (0, "")
            done.touch()
    return run


@pytest.fixture(scope="session")
def expected(finished):
    return Reference(finished)


@pytest.mark.parametrize(
    "faults",
    [
        # Of these kinds, numbers whose faults come one after the other, and early.
        [("SIGTERM", 0), ("a bit flipped", 8), ("stdout closed", 0)],
        pytest.param([("a worker killed", 5)], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_each_start_finds_what_the_fault_before_has_left(faults, folder, expected):
    with plain_signals():
        outcome = run_faults(folder, faults, 0, expected)
    assert outcome.ran and not outcome.violated, (outcome.did, outcome.violated)
    assert not any("ended before" in did for did in outcome.did), outcome.did


def _other_loss(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[3]["loss"] += 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _step_twice(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1]]))


def _other_weights(run):
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    shutil.copytree(run / "checkpoints" / "15", run / "checkpoints" / str(STEPS))


DAMAGE = {
    "curve": _other_loss,
    "another curve": _step_twice,
    "other weights": _other_weights,
    "another export": lambda run: (run / "hf" / "config.json").unlink(),
    "no weights": lambda run: shutil.rmtree(run / "checkpoints" / str(STEPS)),
    "left: .hf.partial-1": lambda run: (run / ".hf.partial-1").mkdir(),
    "left: checkpoints/20.orbax-checkpoint-tmp": lambda run: (run / "checkpoints/20.orbax-checkpoint-tmp").mkdir(),
    "names an owner": lambda run: (run / "run.lock").write_text("process 1"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_what_is_wrong_with_a_run_is_found(problem, finished, expected, tmp_path):
    assert of_finished(finished, expected) == []
    shutil.copytree(finished, tmp_path / "run")
    DAMAGE[problem](tmp_path / "run")
    assert any(problem in found for found in of_finished(tmp_path / "run", expected))


class Ended:
    """A program as of_ended sees it."""

    def __init__(self, out="", err="", left=()):
        self.out, self.err, self._left = out, err, list(left)

    def left(self):
        return self._left

    def end(self):
        self._left = []


@pytest.mark.parametrize(
    ("program", "status", "problem"),
    [
        (Ended(), None, "did not end"),
        (Ended(left=[7]), 0, "1 processes are left"),
        (Ended(), 2, "exit status 2"),
        (Ended(out="Traceback (most recent call last)"), 0, "a traceback"),
        (Ended(err="error: a\nerror: b\n"), 1, "2 lines"),
        (Ended(), 1, "0 lines"),
        (Ended(err="error: the disk is full\n"), 1, "names none"),
        (Ended(err="a warning\n"), 0, "words on standard error"),
    ],
)
def test_what_is_wrong_with_an_end_is_found(program, status, problem):
    assert any(problem in found for found in of_ended(program, status, {0, 1}, ("File too large",)))


def test_a_line_that_must_be_said_is_missed():
    assert of_ended(Ended(err="told\n"), 0, {0}, (), "told") == []
    for err in ("", "told\ntold\n", "another\n"):
        assert "expected 'told' on standard error" in of_ended(Ended(err=err), 0, {0}, (), "told")[0]


@pytest.mark.parametrize(
    "err", ["theirs: 1\nerror: File too large\n", "Traceback (most recent call last)\ntheirs: 2\n"]
)
def test_words_of_libraries_are_let_pass_where_they_are_named(err):
    assert of_ended(Ended(err=err), 1, {1}, ("File too large",), foreign=("theirs",)) == []
    assert of_ended(Ended(err=err), 1, {1}, ("File too large",)) != []
    assert of_ended(Ended(err=f"{err}ours\n"), 1, {1}, ("File too large",), foreign=("theirs",)) != []


def test_a_good_end_has_no_problem():
    assert of_ended(Ended(err="error: File too large\n"), 1, {0, 1}, ("File too large",)) == []
    assert of_ended(Ended(), 0, {0, 1}, ()) == []
    assert len(KINDS) == 21

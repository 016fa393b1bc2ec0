"""What must hold of a program that ended, and of a run that is finished."""

import fcntl
import hashlib
import json

import numpy as np
from helpers.training import flat

from stellarbyte_jax.checkpoint.weights import load_weights

from .program import STEPS

_TOP = {
    *("checkpoints", "corrupt", "hf", "metrics.jsonl", "train.log", "train_config.json", "tokenizer", "run.lock"),
    *("finished.json", "about.json", "samples.jsonl", "report.html", "router_load.jsonl", "router_load.png"),
}
_NUMBERS = ("loss", "gradient_norm", "learning_rate", "validation/loss")


class Reference:
    """An uninterrupted run."""

    def __init__(self, run):
        self.curve = curve(run)
        self.export = export(run)
        self.weights = weights(run)


def curve(run):
    """(step, name, value) of every line in order, so that a step that comes twice is seen."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted((line["step"], name, line[name]) for line in lines for name in _NUMBERS if name in line)


def export(run):
    files = sorted(p for p in (run / "hf").rglob("*") if p.is_file())
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weights(run):
    return flat(load_weights(run, STEPS)[1])


def of_ended(program, status, allowed, error, told="", foreign=()):
    """What is wrong with how a program ended.

    ``error`` lists what its message may name, ``told`` is said with 0; lines that hold one of ``foreign`` are words of
    libraries that the program cannot choose.
    """
    problems = []
    if status is None:
        return ["did not end by itself"]
    left = program.left()
    if left:
        problems.append(f"{len(left)} processes are left")
        program.end()
    if status not in allowed:
        problems.append(f"exit status {status}, expected one of {sorted(allowed)}")
    said = [line for line in program.err.splitlines() if line.strip()]
    if status == 1 and said and any(part in said[-1] for part in foreign):
        return problems  # an error of theirs, with its traceback
    said = [line for line in said if not any(part in line for part in foreign)]
    if "Traceback" in program.out + program.err:
        problems.append(f"a traceback: {said[-1] if said else ''}")
    elif status == 1:
        if len(said) != 1 or not said[0].startswith("error: "):
            problems.append(f"{len(said)} lines on standard error, expected one error: {said[:3]}")
        elif not any(part in said[0] for part in error):
            problems.append(f"the message names none of {list(error)}: {said[0]}")
    elif status == 0 and told:
        if said != [told]:
            problems.append(f"expected {told!r} on standard error, found {said[:3]}")
    elif said and status != -9:
        problems.append(f"exit status {status} with words on standard error: {said[:3]}")
    return problems


def of_finished(run, reference):
    """What is wrong with a run that ended with 0."""
    problems = []
    for name, found in (("curve", curve), ("export", export)):
        try:
            if found(run) != getattr(reference, name):
                problems.append(f"another {name} than the uninterrupted run")
        except (OSError, ValueError) as error:
            problems.append(f"no {name}: {error}")
    try:
        there = weights(run)
        if there.keys() != reference.weights.keys() or not all(
            np.array_equal(there[path], value) for path, value in reference.weights.items()
        ):
            problems.append("other weights than the uninterrupted run")
    except Exception as error:
        problems.append(f"no weights: {error}")
    return problems + leftovers(run)


def leftovers(run):
    """Files that a finished run must not leave."""
    problems = [f"left: {p.name}" for p in run.iterdir() if p.name not in _TOP]
    problems += [f"left: checkpoints/{p.name}" for p in (run / "checkpoints").glob("*") if not p.name.isdigit()]
    problems += [f"left: {p.relative_to(run)}" for p in run.rglob("*partial*") if p.parent != run]
    with (run / "run.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problems.append("the lock is held")
        if lock.read():
            problems.append("the lock names an owner")
    return problems

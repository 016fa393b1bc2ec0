"""One round: a fault, the same command again until the run is finished, and what must hold of it all."""

import contextlib
import random
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field

from .invariants import Reference, of_ended, of_finished
from .kinds import KINDS
from .program import Place, reached

_reading = threading.Lock()  # orbax reads one checkpoint at a time


@dataclass
class Outcome:
    kind: str
    number: int
    seed: int
    seconds: float = 0.0
    did: list[str] = field(default_factory=list)
    violated: list[str] = field(default_factory=list)
    ran: bool = True


class Round:
    """What a fault works with."""

    def __init__(self, place):
        self.place, self.draw = place, random.Random()  # each fault has its own
        self.problems, self.did = [], []
        self.complete = False  # a program said with 0 that all is done
        self.done = []  # folders of runs that a program called complete
        self._programs, self._endings = [], []

    def start(self, **how):
        self._programs.append(self.place.start(**how))
        return self._programs[-1]

    def at(self, program, *moments):
        moment = self.draw.choice(moments)
        came = reached(program, moment, self.draw)
        self.did.append(moment if came else f"{moment} (the program ended before)")
        return came

    def ended(self, program, *statuses, error=(), zero=True, complete=True, told="", foreign=()):
        """The program ends by itself with one of the statuses, or with 0, perhaps with a line, where that is right."""
        status = program.wait()
        self.did.append(f"status {status}")
        self.problems += of_ended(program, status, {*statuses, *([0] if zero else [])}, error, told, foreign)
        self.complete = complete and status == 0

    def finished(self, run):
        self.done.append(run)

    def at_end(self, act):
        self._endings.append(act)

    def close(self):
        for program in self._programs:
            if program.running or program.session():
                program.end()
        for act in self._endings:
            act()


@contextlib.contextmanager
def plain_signals():
    """Programs inherit which signals are ignored, as in the background of a shell; rounds send them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reference(folder):
    """The uninterrupted run, which fills the compile cache too."""
    place = Place(folder / "reference", folder / "xla")
    program = place.start()
    status = program.wait()
    if status != 0:
        raise RuntimeError(f"the run without a fault ended with {status}: {program.err}")
    return Reference(place.run)


def run_round(folder, kind, number, seed, expected, keep=False):
    """Runs one round; the same kind, number and seed draw the same."""
    return run_faults(folder, [(kind, number)], seed, expected, keep)


def run_faults(folder, faults, seed, expected, keep=False):
    """Runs a round in which one fault comes after the other, each of a kind with its number."""
    kinds, number = " then ".join(kind for kind, _ in faults), faults[0][1]
    name = "".join(c if c.isalnum() else "-" for c in kinds) + f"-{number}"
    shutil.rmtree(folder / name, ignore_errors=True)
    place = Place(folder / name, folder / "xla")
    outcome, began = Outcome(kinds, number, seed), time.monotonic()
    round = Round(place)
    try:
        outcome.ran = all(_hit(round, *fault, seed) for fault in faults)
        if outcome.ran:
            _finish(round, expected)
    except Exception as error:
        round.problems.append(f"the harness failed: {type(error).__name__}: {error}")
    finally:
        round.close()
    outcome.did, outcome.violated = round.did, round.problems
    outcome.seconds = float(f"{time.monotonic() - began:.1f}")
    if not (keep and outcome.violated):
        place.remove()
    return outcome


def _hit(round, kind, number, seed):
    """Returns whether the fault can be done on this machine."""
    round.draw = random.Random(f"{seed}/{kind}/{number}")
    round.place.workers = round.draw.choice((0, 2))
    round.place.write_config(round.place.run)
    round.did.append(f"workers {round.place.workers}")
    return KINDS[kind](round) is not False


def _finish(round, expected):
    """Types the same command again: once must be enough, a finished run stays finished."""
    with _reading:
        for run in [*round.done, *([round.place.run] if round.complete else [])]:
            round.problems += of_finished(run, expected)
    for _ in range(3):
        program = round.start()
        round.ended(program)
        if round.complete:
            break
    with _reading:
        round.problems += of_finished(round.place.run, expected)

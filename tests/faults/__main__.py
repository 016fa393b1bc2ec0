"""Many rounds, and a report of them: make faults ARGS="--rounds 300 --jobs 4 --out FILE"."""

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from .kinds import KINDS, NOT_HERE
from .rounds import plain_signals, reference, run_round


def main():
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="rounds at a time")
    parser.add_argument("--out", type=Path, help="where the report goes, JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(KINDS), help="these kinds alone")
    parser.add_argument("--round", type=int, help="this round of the kinds alone")
    parser.add_argument("--keep", type=Path, help="folder in which failed rounds stay")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    kinds = arguments.only or list(KINDS)
    numbers = [(kinds[i % len(kinds)], i // len(kinds)) for i in range(arguments.rounds)]
    if arguments.round is not None:
        numbers = [(kind, arguments.round) for kind in kinds]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, plain_signals(), ThreadPoolExecutor(arguments.jobs) as pool:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        expected = reference(folder)

        def one(which):
            outcome = run_round(folder, *which, arguments.seed, expected, keep=arguments.keep is not None)
            word = "failed" if outcome.violated else "passed" if outcome.ran else "not run here"
            print(
                f"{word}: {outcome.kind} {outcome.number} ({outcome.seconds} s; {', '.join(outcome.did)})", flush=True
            )
            for problem in outcome.violated:
                print(f"    {problem}", flush=True)
            return outcome

        outcomes = list(pool.map(one, numbers))
    told = report(outcomes, arguments.seed, arguments.jobs, time.monotonic() - began)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{told['passed']} of {told['rounds']} rounds passed in {told['seconds']} s")
    return 0 if told["passed"] == told["rounds"] else 1


def report(outcomes, seed, jobs, seconds):
    ran = [outcome for outcome in outcomes if outcome.ran]
    kinds = {}
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        mine = [outcome for outcome in ran if outcome.kind == kind]
        failed = [outcome for outcome in mine if outcome.violated]
        kinds[kind] = {"rounds": len(mine), "passed": len(mine) - len(failed)}
        if failed:
            kinds[kind]["failed"] = [
                {"round": o.number, "seed": o.seed, "did": o.did, "violated": o.violated} for o in failed
            ]
        if not mine:
            kinds[kind] = {"not_run": "not possible on this machine"}
    kinds |= {kind: {"not_run": reason} for kind, reason in NOT_HERE.items()}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint", "grain")}
    return {
        "what": "make faults",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "cores": os.cpu_count(),
        "jobs": jobs,
        "seed": seed,
        "seconds": int(seconds),
        "rounds": len(ran),
        "passed": sum(not outcome.violated for outcome in ran),
        "kinds": kinds,
    }


if __name__ == "__main__":
    sys.exit(main())

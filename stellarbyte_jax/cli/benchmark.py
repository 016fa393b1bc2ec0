"""Measures throughput, beside a peer in the same run, and writes JSON to ``benchmarks/``."""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.evaluation_speed import WORKERS as EVALUATION
from stellarbyte_jax.cli.measurements import WORKERS as OTHERS
from stellarbyte_jax.cli.moe_speed import WORKERS as EXPERTS
from stellarbyte_jax.cli.program import load_settings, local_path, new_parser
from stellarbyte_jax.command import MendableError, command, imports
from stellarbyte_jax.config import TrainConfig

_NAMES = {
    "train": ["synthetic", "real", "huggingface"],
    "data": ["jsonl", "shards"],
    "generate": ["batch_1", "batch_8", "batch_32", "batch_128"],
    "cache": ["float32", "bfloat16", "int8", "float8_e4m3fn"],
    "checkpoint": ["verified", "unverified"],
    "eval": ["eval", "eval_huggingface"],
    "moe": ["dropless", "capacity", "huggingface_moe", "huggingface_moe_bfloat16"],
}
WORKERS = OTHERS | EVALUATION | EXPERTS
_PEERS = ("huggingface", "eval_huggingface", "huggingface_moe", "huggingface_moe_bfloat16")  # they need torch
_CONFIGS = {"moe": ("pretrain_moe", "quickstart_moe")}  # on a GPU, and without
_SMALL = "quickstart"  # what is trained where there is no GPU


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line; each measurement runs this command again with ``--worker``."""
    options = _parse(arguments)
    if options.worker:
        with imports():
            from stellarbyte_jax.training import begin

        config = begin.find_tokenizer(load_settings(options.config, options.set)).used
        print("RESULT " + json.dumps(WORKERS[options.worker](config, options.steps)))
        return 0
    names = [options.only] if options.only else _NAMES[options.what]
    small = options.what != "data" and _platform(options) == "cpu"
    if options.config is None:
        options.config = _CONFIGS.get(options.what, ("pretrain", _SMALL))[small]
        if small:
            print(
                f"no GPU: measures the model of {options.config}, for generation one of 25M parameters; "
                "--config names another"
            )
    load_settings(options.config, options.set)
    if small and options.what == "generate" and not options.only:
        names = ["small_batch_1", "small_batch_8"]
    if not options.only and any(name in _PEERS for name in names):
        missing = not options.no_peer and importlib.util.find_spec("torch") is None
        if missing:
            print("no peer: torch is not installed (pip install torch)")
        if options.no_peer or missing:
            names = [name for name in names if name not in _PEERS]
    results = {}
    for number, name in enumerate(names, 1):
        print(f"measuring {name} ({number} of {len(names)})", file=sys.stderr, flush=True)
        results[name] = _run_worker(name, options)
        print(f"{name:14} " + "  ".join(f"{key} {value}" for key, value in results[name].items()), flush=True)
    output = Path(options.output or f"benchmarks/{options.what}{'-cpu' if small else ''}.json")
    if any("error" in result for result in results.values()):
        print(f"{output} is as it was: a measurement failed", file=sys.stderr)
        return 1
    report = {
        "what": options.what,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "config": {"file": options.config, "set": options.set},
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "benchmark",
        "Measure throughput in medians over repeats, each measurement in a process of its own.\n\n"
        "train       this project's training step on random and real batches, and the Llama of transformers\n"
        "data        batches from the files and from prepared shards; needs no device\n"
        "generate    128 prompt tokens and 256 new ones, a model of 1.10B parameters, by batch size\n"
        "cache       decoding over caches of each dtype, 25M parameters in float32\n"
        "checkpoint  seconds to save and restore a run, and for checksums alone\n"
        "eval        requests of lm-eval (extra eval), and its backend for transformers (extra torch, accelerate)\n"
        "moe         the training step with experts by dispatch, and the Qwen3-MoE of transformers in that shape",
        "train --no-peer",
        "data --set 'data.train=my_corpus/train/*.jsonl'",
        settings=TrainConfig,
    )
    parser.add_argument("what", choices=list(_NAMES), nargs="?", default="train", help="default: %(default)s")
    parser.add_argument("--config", metavar="FILE", help=f"default: pretrain, without a GPU {_SMALL}")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.name=value")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of one repeat (default: %(default)s)")
    parser.add_argument("--no-peer", action="store_true", help="leave the peer out")
    parser.add_argument("--only", choices=sorted(WORKERS), metavar="NAME", help="one measurement alone: %(choices)s")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help="default: benchmarks/WHAT.json, without a GPU WHAT-cpu.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _platform(options: argparse.Namespace) -> str:
    """What JAX finds on this machine, such as cpu, whatever the settings are."""
    print("looking for a GPU", file=sys.stderr, flush=True)
    found = _run_worker("device", argparse.Namespace(**{**vars(options), "config": None, "set": []}))
    if "platform" not in found:
        raise MendableError(f"JAX could not start ({found['error']}): its own message stands above")
    return found["platform"]


def _run_worker(name: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [options.what, "--worker", name, "--steps", str(options.steps), "--config", options.config or _SMALL]
    words += ["--set", *options.set] if options.set else []
    done = subprocess.run(
        [sys.executable, "-m", "stellarbyte_jax", "benchmark", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": f"exit code {done.returncode}"}

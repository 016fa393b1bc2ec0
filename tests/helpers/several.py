"""A run of several processes on this machine, which never outlive the test that started them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from helpers.runs import AT_STEP, ROOT
from helpers.xla import QUICK

PROGRAM = """
import sys
count, rank, address, config, *settings = sys.argv[1:]
rank = int(rank)
several = ["--coordinator", address, "--processes", count, "--process", str(rank)] if int(count) > 1 else []
sys.argv = ["scripts/train.py", "--config", config, *several, "--set", *settings]
import json, os, signal
import numpy as np
from stellarbyte_jax.data.loader import Loader
from stellarbyte_jax.launch import group
group._SILENT_SECONDS = 8.0  # other processes of this machine take its cores too
AT_STEP
following = Loader.__next__
def recorded(self):
    batch = following(self)
    if not self._restart:  # training
        for shard in batch["tokens"].addressable_shards:
            first = shard.index[0].start or 0
            line = {"first": first, "tokens": np.asarray(shard.data).tolist()}
            print("ROWS", json.dumps(line), file=sys.stderr, flush=True)
        print("ROWS null", file=sys.stderr, flush=True)
    return batch
Loader.__next__ = recorded
BEFORE
import runpy
runpy.run_path(ROOT, run_name="__main__")
"""


COMMON = (
    "steps=6",
    "model.hidden_dropout=0",
    "checkpoint.interval=2",
    "checkpoint.keep_latest=10",
    "evaluation.interval=2",
    "evaluation.batches=2",
    "data.shuffle=true",
)


@dataclass(frozen=True)
class Ended:
    """How a process ended; ``batches`` holds, for each that it took, the rows of its devices by their number."""

    code: int
    out: str
    err: str
    batches: list
    ended_at: float


def run(config_file, count, *settings, before="", devices=1, seconds=150, gpus=None):
    """scripts/train.py in ``count`` processes, after ``before`` has bent something; how each of them ended.

    Each has so many devices of a CPU, or of these ``gpus`` as many as the others.
    """
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(count):
            if gpus is None:
                places = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": QUICK}
            else:
                each = len(gpus) // count
                places = {**ON_GPUS, "CUDA_VISIBLE_DEVICES": ",".join(gpus[rank * each : (rank + 1) * each])}
            processes.append(_start(stack, config_file, count, rank, settings, before, places))
        end = time.monotonic() + seconds
        ends: dict[int, float] = {}
        while len(ends) < count:
            assert time.monotonic() < end, [process.poll() for process, _ in processes]
            for rank, (process, _) in enumerate(processes):
                if process.poll() is not None:
                    ends.setdefault(rank, time.monotonic())
            time.sleep(0.05)
        time.sleep(0.5)  # for the last words of a process, which another one says
        return [_ended(process, files, ends[rank]) for rank, (process, files) in enumerate(processes)]


_address: dict[int, str] = {}
# Float32 products as they are on a CPU; no multicast, which hosts that are shared may lack.
ON_GPUS = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "NCCL_NVLS_ENABLE": "0",
}


def _start(stack, config_file, count, rank, settings, before, places):
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _address[0] = f"127.0.0.1:{free.getsockname()[1]}"
    code = (
        PROGRAM.replace("AT_STEP", AT_STEP)
        .replace("BEFORE", before)
        .replace("ROOT", repr(str(ROOT / "scripts" / "train.py")))
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        **places,
    }
    directory = Path(config_file).parent
    files = [directory / f"{name}-{rank}" for name in ("out", "err")]
    with files[0].open("w") as out, files[1].open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(count), str(rank), _address[0], str(config_file), *settings],
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process, files


def _ended(process, files, ended_at):
    out, err = (file.read_text() for file in files)
    batches, rows = [], {}
    for line in err.splitlines():
        if line.startswith("ROWS "):
            found = json.loads(line.removeprefix("ROWS "))
            if found is None:
                batches.append(rows)
                rows = {}
            else:
                rows |= {found["first"] + i: row for i, row in enumerate(found["tokens"])}
    own = [line for line in err.splitlines() if not line.startswith("ROWS ")]
    told = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # which the library prints
    return Ended(process.returncode, "\n".join(told), "\n".join(own), batches, ended_at)


def batches_of(ended, rows=4):
    """The batches that all processes made together, int [batches, rows, length]; no row is missing, none differs."""
    steps = min(len(each.batches) for each in ended)
    found = []
    for step in range(steps):
        whole: dict = {}
        for each in ended:
            for number, row in each.batches[step].items():
                assert whole.setdefault(number, row) == row
        assert sorted(whole) == list(range(rows))
        found.append([whole[number] for number in range(rows)])
    return np.array(found)


def numbers(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "gradient_norm", "validation/loss")
    found = {(line["step"], name): line[name] for line in lines for name in names if name in line}
    assert len(lines) == len({(line["step"], "loss" in line) for line in lines})  # none is written twice
    return found


def assert_same_run(found, expected):
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def assert_done(ended, code=0):
    assert [each.code for each in ended] == [code] * len(ended), "\n".join(each.err for each in ended)

"""scripts/train.py as a user types it, in a session of its own, on a run that is tiny."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.runs import ROOT
from helpers.tiny_documents import save_byte_tokenizer
from helpers.xla import QUICK

LIMIT = 300  # seconds that a run may take, however busy the machine is
STEPS = 20
CONFIG = """
from stellarbyte_jax.config import *

def config():
    return TrainConfig(
        output_dir={run!r},
        steps=20,
        global_batch_size=16,
        ema_decay=0.9,
        model=ByteConfig(
            vocab_size=1280, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=128, compute_dtype="float32", hidden_dropout=0.1, tie_word_embeddings=True,
        ),
        data=DataConfig(
            train=({train!r},), validation=({valid!r},), tokenizer={tokenizer!r}, sequence_length=128,
            workers={workers}, cache_dir={cache!r},
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=3),
        evaluation=EvaluationConfig(interval=10, batches=2),
        checkpoint=CheckpointConfig(interval=5, keep_latest=3),
        logging=LoggingConfig(interval=1),
        export_at_end=True,
        sample_prompts=("ab",),
    )
"""


class Place:
    """The folder of one round: settings, data and the run."""

    def __init__(self, folder, cache, workers=0):
        self.folder, self.cache, self.workers = Path(folder), Path(cache), workers
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = self.folder / "run"
        self.train, self.valid = self.folder / "train.jsonl", self.folder / "valid.jsonl"
        self.started = 0
        self.train.write_text(documents(1, 800))
        self.valid.write_text(documents(2, 60))
        self.config = self.folder / "tiny.py"
        self.write_config(self.run)
        save_byte_tokenizer(self.folder / "tokenizer")

    def write_config(self, run):
        self.run = Path(run)
        text = CONFIG.format(
            run=str(run),
            train=str(self.train),
            valid=str(self.valid),
            tokenizer=str(self.folder / "tokenizer"),
            cache=str(self.folder / "cache"),
            workers=self.workers,
        )
        self.config.write_text(text)

    def start(self, stdout=None):
        self.started += 1
        return Program(self, self.started, stdout)

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def documents(seed, count):
    draw = random.Random(seed)
    lines = ("".join(draw.choices("abcde ", k=draw.randint(10, 60))) for _ in range(count))
    return "".join(json.dumps({"text": line}) + "\n" for line in lines)


class Program:
    """One start of the command; its output goes to files."""

    def __init__(self, place, number, stdout=None):
        self.place = place
        self._out, self._err = place.folder / f"out-{number}", place.folder / f"err-{number}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": QUICK,
            "JAX_COMPILATION_CACHE_DIR": str(place.cache),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(place.config)]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
                env=environment,
                cwd=place.folder,
                start_new_session=True,
            )
        self.pid = self.process.pid

    @property
    def out(self):
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self):
        return self._err.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self):
        return self.process.poll() is None

    def until(self, condition):
        """Returns whether the condition came true while the program ran."""
        end = time.monotonic() + LIMIT
        while self.running and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.003)
        return condition()

    def send(self, number, group=False):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number) if group else self.process.send_signal(number)

    def children(self):
        """Data workers: of what the program started, all but Python's own helper."""
        found = []
        for process in self.session():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{process}/cmdline").read_bytes()
                if process != self.pid and b"spawn_main" in command:
                    found.append(process)
        return sorted(found)

    def session(self):
        """Processes of the session that are alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found.append(int(path.parent.name))
        return found

    def wait(self):
        """The exit status, or None where the program had to be ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(LIMIT)
        self.end()
        return None

    def left(self):
        """Processes that are there some time after the end."""
        end = time.monotonic() + 30
        while (found := self.session()) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def end(self):
        """Ends whatever is left."""
        self.send(signal.SIGKILL, group=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)


def reached(program, moment, draw):
    """Waits for a moment of the run and a little more; returns False where the program ended before."""
    if moment == "start":
        time.sleep(draw.uniform(0, 4))
        return program.running
    if moment == "compile":
        came = program.until(lambda: "tokens a step" in program.out)
    elif moment == "step":
        step = draw.randint(1, STEPS - 1)
        came = program.until(lambda: f"step {step}/{STEPS}  loss" in program.out)
    elif moment == "save":
        folder, step = program.place.run / "checkpoints", draw.choice((5, 10, 15, 20))
        came = program.until(lambda: list(folder.glob(f"{step}*")) != [])
        time.sleep(draw.uniform(0, 0.02))
        return came and program.running
    elif moment == "export":
        run = program.place.run
        came = program.until(lambda: list(run.glob(".hf.partial*")) != [] or (run / "hf").exists())
        time.sleep(draw.uniform(0, 0.01))
        return came and program.running
    elif moment == "end":
        came = program.until(lambda: re.search(rf"step {STEPS}/{STEPS}  loss", program.out) is not None)
        time.sleep(draw.uniform(0, 0.5))
        return came and program.running
    else:
        raise ValueError(moment)
    time.sleep(draw.uniform(0, 0.1))
    return came and program.running

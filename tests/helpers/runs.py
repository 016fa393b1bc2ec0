"""A tiny run, and ways to start, bend and read it."""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.tiny_documents import save_byte_tokenizer
from helpers.xla import QUICK

ROOT = Path(__file__).parents[2]
CONFIG = """
from stellarbyte_jax.config import *

def config():
    return TrainConfig(
        output_dir={run!r},
        steps=20,
        global_batch_size=4,
        ema_decay=0.9,
        model=ByteConfig(
            vocab_size=1280, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, compute_dtype="float32", hidden_dropout=0.1, tie_word_embeddings=True,
        ),
        data=DataConfig(
            train=({train!r},), validation=({valid!r},), tokenizer={tokenizer!r}, sequence_length=32, workers=0,
            cache_dir={cache!r},
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig({schedule}),
        evaluation=EvaluationConfig(interval=10, batches=2),
        checkpoint=CheckpointConfig(interval=7, keep_latest=3),
        logging=LoggingConfig(interval=1),
    )
"""


def write_config(directory, schedule="warmup_steps=3"):
    """The settings of ``directory/run``; one run continues another that lies beside it: they share a tokenizer."""
    tokenizer = directory.parent / "byte_tokenizer"
    if not tokenizer.exists():
        save_byte_tokenizer(tokenizer)
    corpus = str(ROOT / "data" / "tiny_bilingual_valid.jsonl")
    text = CONFIG.format(
        run=str(directory / "run"),
        train=corpus,
        valid=corpus,
        tokenizer=str(tokenizer),
        cache=str(directory / "cache"),
        schedule=schedule,
    )
    path = directory / "tiny.py"
    path.write_text(text)
    return path


def cli(config_file, *settings):
    """scripts/train.py in this process; returns the exit code."""
    argv, sys.argv = sys.argv, ["scripts/train.py", "--config", str(config_file)]
    if settings:
        sys.argv += ["--set", *settings]
    try:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
    raise AssertionError("scripts/train.py did not call sys.exit")


@contextlib.contextmanager
def at_step(number, act):
    """Within it, runs of this process do something after a step."""
    from stellarbyte_jax.training.console import Reporter  # not before the hook that checks types is there

    shown = Reporter.step

    def step(self, step, *args, **kwargs):
        shown(self, step, *args, **kwargs)
        if step == number:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", step)
        yield


# The same of a program; and waiting until its run has a checkpoint, which short steps can outrun.
AT_STEP = """from stellarbyte_jax.training.console import Reporter
def saved(number):
    import pathlib, sys, time
    while not (pathlib.Path(sys.argv[2]).parent / "run" / "checkpoints" / str(number)).exists():
        time.sleep(0.01)
def at_step(number, act):
    shown = Reporter.step
    def step(self, step, *args, **kwargs):
        shown(self, step, *args, **kwargs)
        if step == number:
            act()
    Reporter.step = step
"""


def child(config_file, before="", *settings):
    """scripts/train.py in a process of its own, after ``before`` has bent something."""
    code = f"""
import sys
sys.argv = ["scripts/train.py", "--config", {str(config_file)!r}, *{["--set", *settings] if settings else []!r}]
import os, signal
{AT_STEP}{before}
import runpy
runpy.run_path({str(ROOT / "scripts" / "train.py")!r}, run_name="__main__")
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "XLA_FLAGS": QUICK,  # as in this process: results are compared bit for bit
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def log_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}
    validation = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert len(training) + len(validation) == len(lines)  # no step twice
    return training, validation


def same_weights(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# Of write_config: runs of any number of steps have one program.
CONSTANT = 'name="constant", warmup_steps=0'


def copy_of(straight, tmp_path):
    """The run that write_config(tmp_path) continues."""
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def one_error(capsys, *parts):
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    for part in parts:
        assert part in lines[0], (part, lines[0])
    assert "Traceback" not in captured.out
    return True


def data_setting(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    return f"data.train={path}"

"""A whole run: is resuming exact, does a kill at any time lose nothing, is every mistake one clear line?"""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stellarbyte_jax.config import override
from stellarbyte_jax.train import finish
from stellarbyte_jax.train.checkpoint import load_for_export, save_initial
from stellarbyte_jax.train.loop import train

ROOT = Path(__file__).parents[1]
CONFIG = """
from stellarbyte_jax.config import *

def config():
    return TrainConfig(
        output_dir={run!r},
        steps=20,
        global_batch_size=4,
        ema_decay=0.9,
        model=ByteConfig(
            vocab_size=32000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, compute_dtype="float32", hidden_dropout=0.1, tie_word_embeddings=True,
        ),
        data=DataConfig(
            train=({train!r},), validation=({valid!r},), tokenizer={tokenizer!r}, sequence_length=32, workers=0,
            cache_dir={cache!r},
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=3),
        evaluation=EvaluationConfig(interval=10, batches=2),
        checkpoint=CheckpointConfig(interval=7, keep_latest=3),
        logging=LoggingConfig(interval=1),
    )
"""


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes float and integer types inside."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def write_config(directory):
    corpus = str(ROOT / "data" / "tiny_bilingual_valid.jsonl")
    text = CONFIG.format(
        run=str(directory / "run"),
        train=corpus,
        valid=corpus,
        tokenizer=str(ROOT / "tokenizer"),
        cache=str(directory / "cache"),
    )
    path = directory / "tiny.py"
    path.write_text(text)
    return path


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


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


def child(config_file, before="", *settings):
    """scripts/train.py in a process of its own, after ``before`` has bent something."""
    code = f"""
import sys
sys.argv = ["scripts/train.py", "--config", {str(config_file)!r}, *{["--set", *settings] if settings else []!r}]
import os, signal
from stellarbyte_jax.train.console import Reporter
def at_step(number, act):
    shown = Reporter.step
    def step(self, step, *args, **kwargs):
        shown(self, step, *args, **kwargs)
        if step == number:
            act()
    Reporter.step = step
def saved(number):
    import pathlib, time
    run = pathlib.Path({str(Path(config_file).parent / "run")!r})
    while not (run / "checkpoints" / str(number)).exists():
        time.sleep(0.01)
{before}
import runpy
runpy.run_path({str(ROOT / "scripts" / "train.py")!r}, run_name="__main__")
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "XLA_FLAGS": "",
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twenty steps without interruption: what every interrupted run must arrive at."""
    directory = tmp_path_factory.mktemp("straight")
    done = child(write_config(directory))
    assert done.returncode == 0, done.stderr
    return directory / "run"


INTERRUPTIONS = {
    # seven steps, a checkpoint, two steps more that are lost
    "kill -9 between checkpoints": ("at_step(9, lambda: (saved(7), os.kill(os.getpid(), signal.SIGKILL)))", -9, 7),
    "SIGTERM": ("at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))", 143, None),
    "SIGINT": ("at_step(9, lambda: os.kill(os.getpid(), signal.SIGINT))", 130, None),
    "kill -9 in the middle of a save": (
        """
from orbax.checkpoint._src.path import atomicity
finalize = atomicity.AtomicRenameTemporaryPath.finalize
async def dies(self, *args, **kwargs):
    if "/14." in str(self.get()):
        os.kill(os.getpid(), signal.SIGKILL)
    return await finalize(self, *args, **kwargs)
atomicity.AtomicRenameTemporaryPath.finalize = dies
""",
        -9,
        10,  # the validation of step 10 was the best so far
    ),
}


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_resume_is_exact(how, config_file, straight, tmp_path, capsys):
    before, code, resumed_at = INTERRUPTIONS[how]
    stopped = child(config_file, before)
    assert stopped.returncode == code, stopped.stderr
    assert "Traceback" not in stopped.stderr + stopped.stdout
    run = tmp_path / "run"
    if how.startswith("SIG"):
        assert stopped.stdout.count(f"{how}: saving a checkpoint") == 1
        assert "the same command goes on from there" in stopped.stdout
    if "middle" in how:
        assert any("tmp" in p.name for p in (run / "checkpoints").iterdir())
    resumed = child(config_file)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step " in resumed.stdout
    if resumed_at is not None:
        assert f"resumed at step {resumed_at} " in resumed.stdout
    assert log_of(run) == log_of(straight)
    (config, params), (_, expected) = load_for_export(run), load_for_export(straight)
    assert config.steps == 20 and same_weights(params, expected)
    assert not any("tmp" in p.name for p in (run / "checkpoints").iterdir())


def test_a_second_signal_leaves_at_once(config_file, tmp_path):
    twice = "at_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])"
    done = child(config_file, twice)
    assert done.returncode == 130
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert "Traceback" not in done.stderr


def test_what_a_run_leaves_and_says(straight, capsys):
    names = {p.name for p in straight.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "train.log", "train_config.json", "tokenizer"} <= names
    log = (straight / "train.log").read_text(encoding="utf-8")
    assert "\x1b" not in log and "\r" not in log
    for part in ("model: vocab_size=32000", "first step after", "step 20/20", "validation", "summary", "next:"):
        assert part in log, part
    assert "attention: using xla (cudnn refused: the cpu backend)" in log
    compiling = re.search(r"first step after ([\d.]+) s, ([\d.]+) s of them for XLA", log)
    assert compiling and 0 < float(compiling[2]) < float(compiling[1])
    steps = sorted(int(p.name) for p in (straight / "checkpoints").glob("[0-9]*"))
    training, validation = log_of(straight)
    best = min(validation, key=lambda step: validation[step])
    assert steps == sorted({10, 14, 20, best})  # the three latest, and the best
    assert len(training) == 20 and training[20][0] < training[1][0]
    stored = json.loads((straight / "train_config.json").read_text())
    assert stored["model"]["hidden_size"] == 16
    config, params = load_for_export(straight)
    assert config.optimizer.learning_rate == 1e-2
    before = {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")}
    assert train(override(config, ["checkpoint.keep_latest=3"])) == 0
    assert "is complete: 20 of 20 steps" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")}
    assert not same_weights(params, load_for_export(straight, 10)[1])


def copy_of(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def test_a_corrupt_checkpoint_is_set_aside(straight, config_file, tmp_path, capsys):
    run = copy_of(straight, tmp_path)
    for file in (run / "checkpoints" / "20" / "optimizer").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    assert cli(config_file) == 0
    out = capsys.readouterr().out
    assert "checkpoint 20 is unreadable" in out and "resumed at step 14" in out
    assert (run / "corrupt" / "20").is_dir()
    assert log_of(run) == log_of(straight)


def test_all_checkpoints_corrupt(straight, config_file, tmp_path, capsys):
    run = copy_of(straight, tmp_path)
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file() and "params" in str(file):
            file.write_bytes(b"")
    assert cli(config_file) == 1
    assert one_error(capsys, "no checkpoint in", "could be read")
    with pytest.raises(Exception, match="holds no checkpoint"):
        load_for_export(run)


def one_error(capsys, *parts):
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    for part in parts:
        assert part in lines[0], (part, lines[0])
    assert "Traceback" not in captured.out
    return True


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("model.hidden_size=32", ["another model", "model.hidden_size is 16 there and 32 here"]),
        ("data.sequence_length=16", ["cannot be continued", "data.sequence_length was 32 and is 16"]),
        ("seed=4", ["seed was 0 and is 4"]),
        ("optimizer.name=lion", ["optimizer.name was 'adamw' and is 'lion'"]),
        ("ema_decay=none", ["ema_decay was 0.9 and is None"]),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(setting, parts, straight, config_file, tmp_path, capsys):
    copy_of(straight, tmp_path)
    assert cli(config_file, setting, "steps=30") == 1
    assert one_error(capsys, *parts)


def test_a_longer_run_goes_on(straight, config_file, tmp_path, capsys):
    run = copy_of(straight, tmp_path)
    assert cli(config_file, "steps=22") == 0
    assert "resumed at step 20" in capsys.readouterr().out
    assert set(log_of(run)[0]) == set(range(1, 23))


def test_a_disk_too_small_for_a_checkpoint(straight, config_file, tmp_path, capsys, monkeypatch):
    run = copy_of(straight, tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli(config_file, "steps=22") == 1
    assert one_error(
        capsys, "a checkpoint could not be written", "it takes 0.01 GiB", "Step 20 is the last complete one"
    )
    monkeypatch.undo()
    assert same_weights(load_for_export(run)[1], load_for_export(straight)[1])


def test_a_disk_that_fills_up_while_saving(config_file, tmp_path):
    """The limit on the size of a file stands in for the disk; the earlier checkpoint stays usable."""
    fits = child(config_file, "", "steps=7", "evaluation.interval=100")
    assert fits.returncode == 0, fits.stderr
    before = load_for_export(tmp_path / "run")[1]
    full = child(
        config_file,
        "import resource; at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))",
        "evaluation.interval=100",
    )
    assert full.returncode == 1
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a checkpoint could not be written" in errors[0], full.stderr
    assert "Step 7 is the last complete one" in errors[0], errors[0]
    assert "_SignalingThread" not in full.stderr, full.stderr
    assert same_weights(before, load_for_export(tmp_path / "run")[1])


def bad(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    return f"data.train={path}"


MISTAKES = {
    "missing data file": (lambda t: ["data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
    "empty data file": (lambda t: [bad(t, "")], ["bad.jsonl"]),
    "bad JSON": (lambda t: [bad(t, '{"text": "a"}\n{"text": oh}\n')], ["bad.jsonl:2"]),
    "missing field": (lambda t: [bad(t, '{"body": "a"}\n')], ["bad.jsonl:1", "'text'", "body"]),
    "tokenizer bigger than the vocabulary": (lambda t: ["model.vocab_size=1000"], ["1000", "32000"]),
    "no tokenizer": (lambda t: ["data.tokenizer=nowhere"], ["nowhere"]),
    "not exportable": (
        lambda t: ["export_at_end=true", "model.position_embedding=xpos"],
        ["position_embedding"],
    ),
    "loss that diverges": (
        lambda t: ["optimizer.learning_rate=1e30", "optimizer.gradient_clip_norm=none", "schedule.warmup_steps=0"],
        ["the loss is nan at step", "learning_rate"],
    ),
    "unwritable output": (lambda t: ["output_dir=/dev/null/run"], ["/dev/null/run"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, config_file, tmp_path, capsys):
    make, parts = MISTAKES[mistake]
    assert cli(config_file, *make(tmp_path)) == 1
    assert one_error(capsys, *parts)


def test_a_mistyped_command_line(config_file, tmp_path, capsys):
    for settings, parts in {
        ("model.hiden_size=3",): ["model.hiden_size", "did you mean model.hidden_size"],
        ("model.num_attention_heads=3",): ["16", "3", "not divisible"],
        ("steps=many",): ["steps", "many"],
    }.items():
        assert cli(config_file, *settings) == 2
        assert one_error(capsys, *parts)
    assert cli(tmp_path / "tinny.py") == 2
    assert one_error(capsys, "tinny.py", "did you mean", "tiny.py")


def test_skipped_lines_are_counted_in_the_log(config_file, tmp_path, capsys):
    good = (ROOT / "data" / "tiny_bilingual_valid.jsonl").read_text(encoding="utf-8").splitlines()
    good.insert(3, "{not json")
    setting = bad(tmp_path, "\n".join(good))
    assert cli(config_file, setting, "data.on_error=skip", "global_batch_size=16", "data.sequence_length=64") == 0
    assert "skipped lines" in capsys.readouterr().out


def test_early_stopping_and_accumulation(config_file, tmp_path, capsys):
    code = cli(
        config_file,
        "evaluation.patience=2",
        "evaluation.interval=1",
        "optimizer.learning_rate=1e-12",
        "optimizer.weight_decay=0",
        "ema_decay=none",
        "model.hidden_dropout=0",
        "gradient_accumulation_steps=2",
        "logging.trackers=tensorboard",
        "sample_prompts=春",
        "export_at_end=true",
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "stopped early at step" in captured.out and "sample: 春|" in captured.out
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


def test_the_end_of_the_data_ends_the_run(config_file, tmp_path, capsys):
    lines = (ROOT / "data" / "tiny_bilingual_valid.jsonl").read_text(encoding="utf-8").splitlines()[-4:]
    settings = [bad(tmp_path, "\n".join(lines)), "data.epochs=2", "steps=200", "evaluation.interval=1000"]
    for _ in range(2):  # the second time there is nothing left to do
        assert cli(config_file, *settings) == 0
        assert "the data ended after 2 epochs, at step " in capsys.readouterr().out
    steps = set(log_of(tmp_path / "run")[0])
    assert max(steps) < 200 and load_for_export(tmp_path / "run", max(steps))


def test_training_starts_from_converted_weights(straight, config_file, tmp_path, capsys):
    """A converted checkpoint spells out sizes that a config file may leave to be derived."""
    config, params = load_for_export(straight)
    spelt = dataclasses.replace(config.model, num_key_value_heads=2, head_dim=8)
    save_initial(tmp_path / "run", spelt, params)
    assert cli(config_file, "steps=3", "optimizer.learning_rate=1e-9") == 0
    assert "starting from the weights in" in capsys.readouterr().out
    first = {run: log_of(run)[0][1][0] for run in (straight, tmp_path / "run")}
    assert first[tmp_path / "run"] < first[straight] - 0.5


def test_a_tracker_that_is_not_installed(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli(config_file, "logging.trackers=wandb") == 1
    assert one_error(capsys, "'wandb'", "pip install -e '.[trackers]'")


def test_samples_begin_as_documents_do(straight, monkeypatch):
    config, _ = load_for_export(straight)
    asked = []
    monkeypatch.setattr(finish, "generate_text", lambda *args, **kwargs: asked.append(kwargs["add_bos"]) or ["text"])
    for add_bos in ("true", "false"):
        finish.samples(override(config, ["sample_prompts=a", f"data.add_bos={add_bos}"]), None, {}, print)
    assert asked == [True, False]


def test_signals_are_given_back(config_file, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert cli(config_file, "steps=4", "data.validation=[]") == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert "validation" not in capsys.readouterr().out.split("first step")[1].split("summary")[0]

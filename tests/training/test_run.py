"""A whole run: what it leaves and says, and how it ends."""

import json
import math
import re
import signal

from helpers.runs import ROOT, cli, copy_of, data_setting, log_of, same_weights

from stellarbyte_jax.checkpoint.weights import load_training_facts, load_weights
from stellarbyte_jax.config import override
from stellarbyte_jax.training.run import Finished, train

SELDOM = ("evaluation.interval=100", "checkpoint.interval=100")


def test_what_a_run_leaves_and_says(straight, capsys):
    names = {p.name for p in straight.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "train.log", "train_config.json", "tokenizer"} <= names
    log = (straight / "train.log").read_text(encoding="utf-8")
    assert "\x1b" not in log and "\r" not in log
    for part in ("  model.vocab_size: 1280", "first step after", "step 20/20", "validation", "summary"):
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
    config, params = load_weights(straight)
    assert config.optimizer.learning_rate == 1e-2
    before = {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")}
    assert train(override(config, ["checkpoint.keep_latest=3"])) == Finished(0, 20, "steps")
    assert capsys.readouterr().out == f"the run in {straight} is complete: 20 of 20 steps\n"
    assert before == {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")}
    assert not same_weights(params, load_weights(straight, 10)[1])


def test_a_run_that_may_have_been_over_is_introduced_where_it_goes_on(straight, config_file, tmp_path, capsys):
    copy_of(straight, tmp_path)
    assert cli(config_file, "steps=21", "evaluation.patience=9", "evaluation.interval=100") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [lines.index("settings other than the defaults"), lines.index("  steps: 21")]
    assert shown[0] < shown[1] < lines.index(f"resumed at step 20 from {tmp_path / 'run'}")
    assert lines.count("settings other than the defaults") == 1
    assert set(log_of(tmp_path / "run")[0]) == set(range(1, 22))
    capsys.readouterr()
    assert cli(config_file, "steps=21", "evaluation.patience=9", "evaluation.interval=100") == 0
    assert capsys.readouterr().out.startswith(f"the run in {tmp_path / 'run'} is complete: 21 of 21 steps\nnext:")


def test_skipped_lines_are_counted_in_the_log(config_file, tmp_path, capsys):
    good = (ROOT / "data" / "tiny_bilingual_valid.jsonl").read_text(encoding="utf-8").splitlines()[-3:]
    good.insert(1, "{not json")
    setting = data_setting(tmp_path, "\n".join(good))
    assert cli(config_file, setting, "data.on_error=skip", *SELDOM) == 0
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
    settings = [data_setting(tmp_path, '{"text": "a few words"}\n' * 30), "data.epochs=2", "evaluation.interval=100"]
    settings += ["checkpoint.interval=1", "checkpoint.keep_latest=1", "export_at_end=true"]
    said = []
    for _ in range(2):  # the second time there is nothing left to do
        assert cli(config_file, *settings) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "the data ended" in line]
        said.append(line)
        steps, validated = log_of(tmp_path / "run")
        last = max(steps)
        assert list(validated) == [last] and last < 20 and load_weights(tmp_path / "run", last)
        assert (tmp_path / "run" / "checkpoints" / str(last) / "metrics").is_dir()  # it may be the best
        assert json.loads((tmp_path / "run" / "finished.json").read_text()) == {"step": last, "exported": True}
        card = (tmp_path / "run" / "hf" / "README.md").read_text(encoding="utf-8")
        assert f"| steps | {last} |" in card and f"| validation loss | {validated[last]:.4f} nats a token |" in card
        facts = load_training_facts(tmp_path / "run")
        assert facts is not None and (facts.steps, facts.validation_loss) == (last, validated[last])
    rate = 0.1 + 0.9 * (1 + math.cos(math.pi * (last - 1 - 3) / (20 - 1 - 3))) / 2
    assert said == 2 * [
        f"the data ended after 2 epochs, at step {last} of 20, with the learning rate at {rate:.3g} of its peak: the "
        f"schedule comes to its end, 0.1, at step 20. With steps={last} and another output_dir it ends with the data"
    ]


def test_signals_are_given_back(config_file, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert cli(config_file, "data.validation=[]", "evaluation.interval=500", "evaluation.batches=50") == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert "validation" not in capsys.readouterr().out.split("first step")[1].split("summary")[0]

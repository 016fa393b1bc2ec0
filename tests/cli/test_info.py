"""The command ``info``: of a config file, a run and a Hugging Face directory; tables, and reports as files."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from helpers.training import settings
from helpers.variants import init

from stellarbyte_jax.checkpoint.weights import save_initial
from stellarbyte_jax.cli import info
from stellarbyte_jax.cli.info import main
from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.files import shipped
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.inspect.memory import cache_bytes
from stellarbyte_jax.inspect.numbers import of_bytes
from stellarbyte_jax.inspect.speed import Speed
from stellarbyte_jax.model.decoder import ByteTransformer

SMALL = ByteConfig(
    vocab_size=67,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    compute_dtype="float32",
)
QUICKSTART = str(shipped("configs") / "quickstart.py")


@pytest.fixture(scope="module")
def params():
    return jax.device_get(init(ByteTransformer(SMALL)))


@pytest.fixture
def directory(params, tmp_path):
    save_pretrained(tmp_path / "a [b]model", ByteTransformer(SMALL), params)
    return str(tmp_path / "a [b]model")


def rows(printed, first):
    """Cells of the table rows whose first cell is this."""
    found = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in printed.splitlines() if "│" in line]
    return [row[1:] for row in found if row[0] == first]


def test_a_config_file_needs_no_weights(capsys):
    assert main(["--config", QUICKSTART, "--set", "model.num_hidden_layers=6"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Model report: quickstart\n")
    assert rows(printed, "layers") == [["6"]]
    per_layer = 3 * 128 * 384 + 2 * 128 * 128 + 2 * 128 * 64 + 2 * 128
    total = 32000 * 128 + 6 * per_layer + 128
    assert f"{total:,}" in rows(printed, "in all")[0]
    assert rows(printed, "optimizer (muon)") and "8 rows of 128 tokens" in printed
    assert "Statistics" not in printed and "Measured" not in printed


def test_a_model_and_its_weights(directory, params, capsys):
    assert main(["--model", directory, "--set", "cache.dtype=int8", "--cache-batch", "2", "--cache-length", "10"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Model report: a [b]model\n")
    assert "2 x 10 tokens" in printed and "1 rows of 64 tokens" in printed and rows(printed, "optimizer (adamw)")
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]).astype(np.float64)
    mean, deviation = (row for row in (f"{flat.mean():.3g}", f"{flat.std():.3g}"))
    assert [row for row in rows(printed, "in all") if row[:2] == [mean, deviation]]
    assert rows(printed, "cache")[0][0] == of_bytes(cache_bytes(SMALL, 2, 10, "int8"))
    assert main(["--model", directory, "--no-weights"]) == 0
    assert "Statistics" not in capsys.readouterr().out


def test_the_checkpoint_of_a_run_that_is_named_is_read(params, tmp_path, monkeypatch):
    save_initial(tmp_path / "run", SMALL, params)
    read, asked = info.load_weights, []
    monkeypatch.setattr(info, "load_weights", lambda *named: asked.append(named) or read(tmp_path / "run"))
    for words in (["run/checkpoints/3"], ["run", "--step", "4"], ["run"]):
        model, *more = words
        subject = info._subject(info._parse(["--model", str(tmp_path / model), *more]))
        assert subject.name == "run"
    assert asked == [(tmp_path / "run", step) for step in (3, 4, None)]


def test_a_run_has_its_own_sizes(params, tmp_path, capsys):
    save_initial(tmp_path / "run", SMALL, params, str(shipped("tokenizer")))
    assert main(["--model", str(tmp_path / "run" / "checkpoints" / "0"), "--rows", "3", "--length", "24"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Model report: run\n") and "3 rows of 24 tokens" in printed
    assert "Statistics of the weights" in printed
    assert main(["--model", str(tmp_path / "run"), "--no-weights"]) == 0
    printed = capsys.readouterr().out
    assert "32 rows of 64 tokens" in printed and "Statistics" not in printed


def test_speed_is_measured_where_asked_for(directory, monkeypatch, capsys):
    asked = []

    def measure(model, params, sizes, **settings):
        asked.append((sizes, settings, jax.tree.leaves(params)[0].shape))
        return [Speed(size, 1000.0 * size, 10.0 * size) for size in sizes]

    monkeypatch.setattr(info, "measure_speed", measure)
    assert main(["--model", directory, "--speed"]) == 0
    printed = capsys.readouterr().out
    assert rows(printed, "8") == [["8,000", "80"]] and "fresh" not in printed
    assert asked[0][0] == [1, 8] and asked[0][1] == {"prompt_length": 1, "new_tokens": 63, "repeats": 3}
    assert main(["--model", directory, "--speed", "--no-weights"]) == 0
    printed = capsys.readouterr().out  # they are read all the same, as what is measured
    assert "fresh" not in printed and "Statistics" not in printed and asked.pop()[0] == [1, 8]
    small = ["model.hidden_size=8", "model.num_attention_heads=2", "model.vocab_size=32", "model.num_hidden_layers=1"]
    assert main(["--config", QUICKSTART, "--set", *small, "--speed", "--batch-sizes", "4"]) == 0
    printed = capsys.readouterr().out
    assert rows(printed, "4") == [["4,000", "40"]] and "The weights are fresh ones" in printed
    assert asked[1][0] == [4] and asked[1][1] == {"prompt_length": 128, "new_tokens": 64, "repeats": 3}


def test_reports_are_files(directory, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "some" / "where"
    assert main(["--model", directory, "--output", str(target), "--format", "markdown"]) == 0
    assert capsys.readouterr().out == f"wrote {target / 'report.md'}\n"
    images = {path.name for path in target.glob("*.png")}
    assert images == {"structure.png", "parameters.png", "comparison.png", "deviations.png"}
    text = (target / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((.*?)\)", text)) == images and text.startswith("# Model report: a \\[b\\]model\n")
    assert main(["--config", QUICKSTART, "--output", str(target), "--format", "HTML", "--language", "zh-CN"]) == 0
    page = (target / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "<h1>模型报告: quickstart</h1>" in page


def test_a_reference_is_another_config(capsys):
    assert main(["--config", QUICKSTART, "--reference", QUICKSTART]) == 0
    printed = capsys.readouterr().out
    assert rows(printed, "depth") == [["4", "4", "1×"]] and "The reference is quickstart." in printed
    assert main(["--config", QUICKSTART]) == 0
    assert rows(capsys.readouterr().out, "depth") == [["4", "12", "0.333×"]]


def test_without_matplotlib_reports_name_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with monkeypatch.context() as patch:
        patch.delattr(info, "_subject")  # it is told before anything is read
        assert main(["--config", QUICKSTART, "--output", str(tmp_path / "report")]) == 1
    told = capsys.readouterr().err
    assert told == "error: charts need matplotlib: pip install matplotlib\n"
    assert not (tmp_path / "report").exists()
    assert main(["--config", QUICKSTART]) == 0  # tables need none


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "nowhere.py"], 2, "config file nowhere.py does not exist"),
        (["--config", QUICKSTART, "--set", "model.hidden=3"], 2, "hidden"),
        (["--model", "nowhere"], 1, "nowhere does not exist (looked from"),
        (["--model", "tests"], 1, "neither a Hugging Face directory (config.json) nor a run directory"),
        (["--config", QUICKSTART, "--batch-sizes", "3"], "exit", "--batch-sizes belongs to --speed"),
        (["--config", QUICKSTART, "--format", "html"], "exit", "--format belongs to --output"),
        (["--config", QUICKSTART, "--step", "3"], "exit", "--step belongs to --model"),
        (["--config", QUICKSTART, "--rows", "0"], "exit", "'0' must be an integer of at least 1"),
        ([], "exit", "one of the arguments --model --config is required"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, code, message, capsys):
    if code == "exit":
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    else:
        assert main(arguments) == code
    told = capsys.readouterr().err
    assert message in told.splitlines()[-1]


def test_a_report_that_cannot_be_written(directory, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    assert main(["--config", QUICKSTART, "--output", str(tmp_path / "file")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "report.md could not be written: " in line and "choose another --output" in line
    assert main(["--model", directory, "--step", "3"]) == 1
    assert "a step belongs to a run directory" in capsys.readouterr().err
    assert main(["--model", directory, "--set", "hidden_size=16"]) == 2
    assert "asks for other weights" in capsys.readouterr().err
    assert json.loads((tmp_path / "a [b]model" / "config.json").read_text())["hidden_size"] == 32


def test_runs_tell_their_optimizer_and_average(monkeypatch, capsys, tmp_path):
    run = settings(output_dir=str(tmp_path), model=SMALL, ema_decay=0.9, gradient_accumulation_steps=2)
    monkeypatch.setattr(info, "load", lambda *_: run)
    assert main(["--config", "x.py"]) == 0
    printed = capsys.readouterr().out
    assert rows(printed, "average of the weights") == rows(printed, "weights")
    assert f"{run.global_batch_size // 2} rows of {run.data.sequence_length} tokens" in printed


def test_a_config_that_begins_with_other_weights_has_their_model(directory, tmp_path, capsys):
    config = "from stellarbyte_jax.config import TrainConfig\n\ndef config():\n    return TrainConfig("
    config += f'output_dir="new", steps=100, init_from={directory!r})\n'
    (tmp_path / "run.py").write_text(config)
    assert main(["--config", str(tmp_path / "run.py"), "--set", "data.sequence_length=16"]) == 0
    assert rows(capsys.readouterr().out, "layers") == [["2"]]

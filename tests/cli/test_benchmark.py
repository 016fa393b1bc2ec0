"""The command benchmark: what is measured where, and that a failure replaces no figures."""

import json

import pytest
from helpers.training import settings

from stellarbyte_jax.cli import benchmark
from stellarbyte_jax.cli.measurements import WORKERS


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with or without a GPU, whose measurements are made up; returns what was measured."""
    monkeypatch.chdir(tmp_path)
    measured = []

    def make(platform, fails=()):
        def run(name, options):
            if name == "device":
                return {"platform": platform}
            measured.append((name, options.config))
            return {"error": "exit code 1"} if name in fails else {"tokens_per_second": 5}

        monkeypatch.setattr(benchmark, "_run_worker", run)
        return measured

    return make


@pytest.fixture
def torch(monkeypatch):
    def make(installed):
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: object() if installed else None)

    make(True)
    return make


@pytest.mark.parametrize(
    ("platform", "config", "written", "generation"),
    [
        ("gpu", "pretrain", "train.json", ["batch_1", "batch_8", "batch_32", "batch_128"]),
        ("cpu", "quickstart", "train-cpu.json", ["small_batch_1", "small_batch_8"]),
    ],
)
def test_a_machine_gets_the_size_that_fits(platform, config, written, generation, machine, torch, tmp_path, capsys):
    measured = machine(platform)
    assert benchmark.main(["train"]) == 0
    assert measured == [(name, config) for name in ("synthetic", "real", "huggingface")]
    report = json.loads((tmp_path / "benchmarks" / written).read_text())
    assert report["results"]["real"] == {"tokens_per_second": 5} and report["config"]["file"] == config
    assert ("no GPU" in capsys.readouterr().out) == (platform == "cpu")
    measured.clear()
    assert benchmark.main(["generate", "--output", "out/x.json"]) == 0
    assert [name for name, _ in measured] == generation and (tmp_path / "out" / "x.json").is_file()
    measured.clear()
    assert benchmark.main(["train", "--config", "stellarbyte", "--only", "real"]) == 0
    assert measured == [("real", "stellarbyte")]


def test_data_needs_no_device(machine, torch, tmp_path, capsys):
    measured = machine("cpu")
    assert benchmark.main(["data"]) == 0
    assert measured == [("jsonl", "pretrain"), ("shards", "pretrain")]
    assert (tmp_path / "benchmarks" / "data.json").is_file() and "no GPU" not in capsys.readouterr().out


def test_a_failure_replaces_no_figures(machine, torch, tmp_path, capsys):
    kept = tmp_path / "benchmarks" / "train.json"
    kept.parent.mkdir()
    kept.write_text("figures")
    machine("gpu", fails=["real"])
    assert benchmark.main(["train"]) == 1
    printed = capsys.readouterr()
    assert kept.read_text() == "figures" and "train.json is as it was" in printed.err
    assert "synthetic" in printed.out and "exit code 1" in printed.out


def test_without_torch_there_is_no_peer_and_a_line(machine, torch, capsys):
    measured = machine("gpu")
    torch(False)
    assert benchmark.main(["train"]) == 0
    assert [name for name, _ in measured] == ["synthetic", "real"]
    assert "no peer: torch is not installed" in capsys.readouterr().out
    assert benchmark.main(["train", "--no-peer"]) == 0 and "torch" not in capsys.readouterr().out


def test_a_wrong_setting_is_told_before_any_measurement(machine, torch, capsys):
    measured = machine("gpu")
    assert benchmark.main(["train", "--set", "model.hiden_size=3"]) == 2
    assert not measured and "did you mean" in capsys.readouterr().err


def test_a_worker_is_a_process_of_its_own(monkeypatch, tmp_path):
    """The parent holds no device; a failure of the child is a result."""
    options = benchmark._parse(["train", "--config", "quickstart"])
    assert benchmark._run_worker("device", options) == {"platform": "cpu"}
    options.set = ["steps=nonsense"]
    assert benchmark._run_worker("device", options) == {"error": "exit code 2"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch
@pytest.mark.parametrize("name", ["synthetic", "huggingface"])
def test_a_step_is_measured(name, monkeypatch):
    if name == "huggingface":
        pytest.importorskip("torch", reason="the peer is transformers on torch: pip install -e '.[torch]'")
    result = WORKERS[name](settings(), 1)
    assert result["repeats"] == 5 and 0 < result["lowest"] <= result["tokens_per_second"] <= result["highest"]
    assert "cpu" in result["on"].lower() and 0 < result["loss"] < 10

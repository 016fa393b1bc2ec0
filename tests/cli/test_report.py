"""The command that draws runs: where it writes, what it prints, what it refuses."""

import json
import sys

import pytest

from stellarbyte_jax.cli import report
from stellarbyte_jax.cli.main import main
from stellarbyte_jax.training import plots


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two runs in the working directory; nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "check", lambda asked: None)
    monkeypatch.setattr(plots, "draw", lambda *args: b"png")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        line = {"step": 1, "loss": 2.0, "tokens": 5}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + '\n{"st')
    return tmp_path


def test_a_page_lies_in_its_run_or_where_it_is_asked_for(run, capsys):
    assert report.main(["a"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "note: a/metrics.jsonl: 1 damaged line was skipped"
    assert printed.splitlines()[-1] == "report: a/report.html" and "<h1>a</h1>" in (run / "a/report.html").read_text()
    assert main(["report", "a", "b"]) == 0
    assert "<h1>a and b</h1>" in (run / "report.html").read_text()
    assert report.main(["b", "--output", "x.html", "--x", "tokens"]) == 0
    assert (run / "x.html").is_file() and not (run / "b/report.html").exists()
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["c"], 1, r"error: c/metrics.jsonl is missing: give the directory of a run"),
        (["a", "./a"], 2, "error: a run is given twice"),
        (["a", "--x", "time"], 1, "error: a: no line of its metrics.jsonl has 'wall_seconds'"),
        (["a", "--output", "a/metrics.jsonl"], 2, "error: --output a/metrics.jsonl is a page"),
        (["a", "--output", "none/x.html"], 1, "error: none/x.html could not be written: No such file or directory; "),
    ],
)
def test_mistakes_are_one_line(run, capsys, arguments, code, message):
    before = (run / "a/metrics.jsonl").read_text()
    assert report.main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert (run / "a/metrics.jsonl").read_text() == before and not (run / "a/report.html").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert report.main([str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a report needs matplotlib,") and line.endswith("pip install matplotlib")

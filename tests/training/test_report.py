"""The page: it needs nothing else, runs nothing, and says what it holds."""

import base64
import html.parser
import json
import re
import shutil

import numpy as np
import pytest
from helpers.runs import cli
from helpers.training import settings

from stellarbyte_jax.config import override
from stellarbyte_jax.training import heatmap, plots, report
from stellarbyte_jax.training.record import about
from stellarbyte_jax.training.report import make_page


@pytest.fixture
def matplotlib():
    pytest.importorskip("matplotlib", reason="pip install -e '.[report]'")


class Page(html.parser.HTMLParser):
    """Texts, images and rows of tables; every tag must be closed, and none may fetch or run anything."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.rows, self.titles = [], [], [], [], []
        self.greyed = []
        self.feed(text)
        assert self.open == []
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "a", "object")
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("data:image/png;base64,")
                self.images.append(base64.b64decode(value.partition(",")[2]))
        if tag == "tr":
            self.rows.append([])
            if ("class", "same") in attrs:
                self.greyed.append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "figcaption" in self.open and self.open[-1] == "figcaption":
            self.titles.append(data.strip())

    @property
    def same(self):
        return {row[0] for row in self.greyed}

    @property
    def table(self):
        return {row[0]: row[1:] for row in self.rows}


def write_run(directory, count=30, loss=3.0, config=None, active=123_456, **extra):
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, count + 1):
        numbers = {"loss": loss + 1 / step, "learning_rate": 1e-3, "tokens_per_second": 100 + step, "padding": 0.25}
        lines.append({"step": step, **numbers, "gradient_norm": 1.0, "wall_seconds": 2.0 * step, "tokens": 64 * step})
        lines[-1] |= extra
        if step % 10 == 0:
            lines.append({"step": step, "validation/loss": loss + abs(step - 20) / 100, "wall_seconds": 2.0 * step})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "train_config.json").write_text((config or settings()).to_json())
    (directory / "about.json").write_text(json.dumps(about(123_456, active)))
    return directory


def page_of(*directories, x="steps"):
    text, notes = make_page(directories, x)
    return Page(text), notes


@pytest.fixture
def drawn(monkeypatch):
    """Curves of each plot, which is not drawn, so that the test is quick."""
    calls = []
    monkeypatch.setattr(plots, "check", lambda asked: None)
    monkeypatch.setattr(plots, "draw", lambda *args: calls.append(args) or b"png")
    return calls


def test_a_page_has_numbers_plots_settings_and_environment(tmp_path, matplotlib):
    page, notes = page_of(write_run(tmp_path / "small"))
    assert notes == [] and all(image.startswith(b"\x89PNG") for image in page.images)
    titles = ["Training loss", "Validation loss", "Learning rate", "Gradient norm", "Tokens a second"]
    assert page.titles == [*titles, "Share of padding"] and len(page.images) == 6
    expected = {
        "steps done": "30 of 50",
        "tokens (without padding)": "1,920",
        "time of training": "1 min 0 s",
        "parameters": "123,456",
        "training loss": f"{3 + 1 / 30:.4f}",
        "best validation loss": "3.0000 (step 20)",
        "last validation loss": "3.1000",
        "tokens a second (median)": f"{np.median(np.arange(101, 131)):,.0f}",
        "optimizer.learning_rate": "0.01",
        "model.hidden_size": "32",
    }
    assert {name: page.table.get(name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert "seed" not in page.table and page.table["cpu_cores"] and page.table["jax"]
    assert "peak device memory" not in page.table, "nothing was measured"


def test_a_model_with_experts_has_active_parameters_too(tmp_path, drawn):
    page, _ = page_of(write_run(tmp_path / "experts", active=1_234))
    assert (page.table["parameters"], page.table["active parameters"]) == (["123,456"], ["1,234"])
    page, _ = page_of(write_run(tmp_path / "dense"))
    assert "active parameters" not in page.table


def test_runs_lie_over_each_other(tmp_path, drawn):
    first = write_run(tmp_path / "a" / "run", 30, config=override(settings(), ["seed=1"]))
    second = write_run(tmp_path / "b" / "run", 20, loss=2.0, config=override(settings(), ["seed=2", "steps=60"]))
    page, _ = page_of(first, second)
    assert page.table[""] == [str(first), str(second)], "of equal names: by their paths"
    assert page.table["steps done"] == ["30 of 50", "20 of 60"] and page.table["seed"] == ["1", "2"]
    names = [row[0] for row in page.rows]
    assert names.index("seed") < names.index("output_dir"), "what differs comes first"
    assert {"output_dir", "jax"} <= page.same and not {"seed", "steps", "training loss"} & page.same
    curves, label, end, scale = drawn[0]
    assert (label, end, scale) == ("optimizer step", 30.0, "free")
    assert [(c.number, c.look, len(c.x)) for c in curves] == [
        *((0, "thin", 30), (0, "line", 30), (0, "rare", 3)),
        *((1, "thin", 20), (1, "line", 20), (1, "rare", 2)),
    ]
    np.testing.assert_allclose(curves[3].y, 2 + 1 / np.arange(1, 21))
    assert page_of(first)[0].same == set(), "there is nothing to compare a single run with"
    page, _ = page_of(write_run(tmp_path / "c"), second)
    assert page.table[""] == ["c", "run"]


def test_a_run_is_named_once(tmp_path, drawn):
    with pytest.raises(ValueError, match="a run is given twice"):
        make_page([write_run(tmp_path / "a"), tmp_path / "b" / ".." / "a"])


@pytest.mark.parametrize(
    ("x", "label", "end", "values"),
    [
        ("tokens", "tokens (without padding)", 1920.0, 64.0 * np.arange(1, 31)),
        ("time", "time of training (s)", 60.0, 2.0 * np.arange(1, 31)),
    ],
)
def test_other_axes(tmp_path, drawn, x, label, end, values):
    page_of(write_run(tmp_path / "a"), x=x)
    curves, *rest = drawn[0]
    assert rest == [label, end, "free"]
    np.testing.assert_array_equal(curves[0].x, values)
    if x == "tokens":
        assert len(curves[2].x) == 0, "validation lines of this run have no tokens"


@pytest.mark.parametrize(
    ("seconds", "unit", "end"), [(119, "s", 119), (120, "min", 2), (7199, "min", 119.98), (9000, "h", 2.5)]
)
def test_time_has_a_unit_that_fits(tmp_path, drawn, seconds, unit, end):
    page_of(write_run(tmp_path / "a", 1, wall_seconds=seconds), x="time")
    curves, label, found, _ = drawn[0]
    assert label == f"time of training ({unit})" and found == pytest.approx(end, abs=0.01) == curves[0].x[0]


def test_an_axis_that_no_line_has_is_an_error(tmp_path, drawn):
    run = write_run(tmp_path / "old")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["wall_seconds"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"^old: no line of its metrics.jsonl has 'wall_seconds', since an earlier"):
        make_page([run], "time")


def test_further_metrics_have_plots_and_vectors_one_of_theirs(tmp_path, drawn):
    vector = {f"load/{i}": i / 20 for i in range(12)}
    more = {"accuracy": 0.5, "cross_entropy": 2.0, "target_tokens": 9, **vector}
    page, _ = page_of(write_run(tmp_path / "a", **more))
    assert page.titles[6:] == ["Training accuracy", "Cross entropy", "load"]
    curves, *_ = drawn[-1]
    assert [c.y[0] for c in curves] == [i / 20 for i in range(12)] and [c.shade for c in curves] == [
        i / 11 for i in range(12)
    ]
    assert "entries 0 (dark) to 11 (light)" in page.text
    assert drawn[6][3] == "share" and drawn[5][3] == "share"


def routers(layers, **extra):
    """Metrics of routers as a run writes them."""
    of_layers = {f"router/max_load/{layer}": layer / 4 for layer in layers}
    return {"router/max_load": max(layers) / 4, "router/drop_rate": 0.5, "router/loss/z": 2.0, **of_layers, **extra}


def test_metrics_of_layers_lie_behind_that_of_them_all(tmp_path, drawn):
    run = write_run(tmp_path / "a", 5, **routers((1, 3, 11)))
    page, _ = page_of(run)
    assert page.titles[5:] == [
        "Choices that no expert took",
        "router/loss/z",
        "Load of the busiest expert over the mean",
    ]
    assert drawn[5][3] == "share"
    curves, *_ = drawn[7]
    assert [(c.look, c.shade, c.y[0]) for c in curves] == [
        *(("thin", 0.0, 0.25), ("thin", 0.5, 0.75), ("thin", 1.0, 2.75)),
        ("line", None, 2.75),
    ]
    assert "thick: all layers; thin: layers 1 (dark) to 11 (light)" in page.text
    drawn.clear()
    page_of(run, write_run(tmp_path / "b", 5, **routers((1,))))
    assert [(c.number, c.look, c.y[0]) for c in drawn[7][0]] == [(0, "line", 2.75), (1, "line", 0.25)], "beside others"
    drawn.clear()
    page_of(tmp_path / "b")
    assert [(c.look, c.y[0]) for c in drawn[7][0]] == [("line", 0.25)], "one layer is them all"


def test_the_load_of_experts_has_its_picture(tmp_path, drawn, monkeypatch):
    shown = []
    monkeypatch.setattr(heatmap, "draw", lambda loads: shown.append(loads) or b"heat")
    run = write_run(tmp_path / "a", 3)
    assert "Load of experts" not in page_of(run)[0].text
    lines = ['{"step": 1, "load": {"2": [0.25, 0.75]}}', '{"step": 1']
    (run / "router_load.jsonl").write_text("\n".join(lines) + "\n")
    page, notes = page_of(run)
    assert page.images[-1] == b"heat" and page.text.count("Load of experts") == 1
    assert notes == [f"{run}/router_load.jsonl: 1 damaged line was skipped"]
    assert shown[0].layers == (2,) and shown[0].shares_SLE.tolist() == [[[0.25, 0.75]]]
    assert "Load of experts of b" in page_of(write_run(tmp_path / "c", 3), write_copy(run, tmp_path / "b"))[0].text


def write_copy(run, to):
    shutil.copytree(run, to)
    return to


def test_a_cross_entropy_that_is_the_loss_has_no_plot(tmp_path, drawn):
    run = write_run(tmp_path / "a")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "cross_entropy": line["loss"]} if "loss" in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, _ = page_of(run)
    assert "Cross entropy" not in page.titles


def test_thinned_points_and_averages_are_told(tmp_path, drawn):
    page, _ = page_of(write_run(tmp_path / "a", plots.MOST_POINTS + 1))
    assert "2,000 of 2,001 points" in page.text and "average over about 1 %" in page.text
    page, _ = page_of(write_run(tmp_path / "b", 5))
    assert "points" not in page.text and "average" not in page.text


HOSTILE = "</td><script>alert(1)</script>\x1b[2J\u202e$x_{&amp;"


def test_foreign_text_stays_text(tmp_path, drawn):
    """In the run's name, a metric's, a prompt, a text, settings and environment."""
    name = HOSTILE.replace("/", "")
    run = write_run(tmp_path / name, 3, config=override(settings(), ["sample_prompts=x"]), **{HOSTILE: 1.0})
    config = json.loads((run / "train_config.json").read_text())
    config["sample_prompts"] = [HOSTILE]
    (run / "train_config.json").write_text(json.dumps(config))
    (run / "about.json").write_text(json.dumps({"parameters": HOSTILE, "environment": {HOSTILE: HOSTILE}}))
    (run / "samples.jsonl").write_text(json.dumps({"step": 3, "prompt": HOSTILE, "text": f"春\n{HOSTILE}"}) + "\n")
    page, _ = page_of(run)  # Page refuses scripts
    assert page.text.count("<script>alert(1)") >= 6 and "春\n</td><script>" in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text and "\\x1b[2J\\u202e" in page.text
    for facts in ([], {"environment": [1]}, {"environment": {"a": [1] * 10_000}}, {"parameters": 10**400}):
        (run / "about.json").write_text(json.dumps(facts))
        assert len(page_of(run)[0].text) < 20_000


def test_samples_are_shown_newest_first_and_not_without_end(tmp_path, drawn):
    run = write_run(tmp_path / "a", 3)
    lines = [json.dumps({"step": step, "prompt": "p", "text": f"text {step}."}) for step in range(1, 61)]
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n")
    page, _ = page_of(run)
    assert re.findall(r"text (\d+)\.", page.text) == [str(step) for step in range(60, 10, -1)]
    assert "10 earlier rounds are in samples.jsonl" in page.text
    text, _ = make_page([run])
    assert re.findall(r"<details open><summary>(.*?)</summary>", text) == ["step 60"], "the newest is seen at once"


def test_long_texts_are_cut(tmp_path, drawn):
    run = write_run(tmp_path / "a", 3)
    (run / "train_config.json").write_text(settings(output_dir="Q" * 3000).to_json())
    (run / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": "X" * 9000, "text": "Z" * 9000}) + "\n")
    page, _ = page_of(run)
    assert 0 < page.text.count("Q") <= 500 and (page.text.count("X"), page.text.count("Z")) == (5000, 5000)


@pytest.mark.parametrize(("seconds", "text"), [(59.4, "0 min 59 s"), (3599, "59 min 59 s"), (9015, "2 h 30 min")])
def test_times_are_told_in_two_units(seconds, text):
    assert report._duration(seconds) == text


def test_there_is_an_end_to_the_plots(tmp_path, drawn):
    run = tmp_path / "a"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, **{f"m{i}": i for i in range(70)}}) + "\n")
    page, _ = page_of(run)
    assert len(page.images) == 60


def test_what_is_missing_is_told_in_the_page(tmp_path, drawn):
    run = write_run(tmp_path / "a", 3)
    (run / "train_config.json").unlink()
    (run / "about.json").unlink()
    page, notes = page_of(run)
    assert len(notes) == 2 and all(note in page.text for note in notes)
    assert page.table["steps done"] == ["3"]


def test_a_run_makes_its_report_at_its_end_and_later_what_is_missing(config_file, tmp_path, capsys, matplotlib):
    run = tmp_path / "run"
    settings = ("steps=4", "logging.interval=2", "evaluation.interval=2", "sample_prompts=春", "report_at_end=true")
    assert cli(config_file, *settings) == 0
    assert f"report: {run}/report.html" in capsys.readouterr().out
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.table["steps done"] == ["4 of 4"]
    assert "春" in page.text and "Samples" in page.text and "Validation loss" in page.titles
    written = (run / "report.html").stat().st_mtime_ns
    assert cli(config_file, *settings) == 0
    assert (run / "report.html").stat().st_mtime_ns == written, "it is there"
    (run / "report.html").unlink()
    assert cli(config_file, *settings) == 0
    assert (run / "report.html").is_file()
    capsys.readouterr()
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert cli(config_file, *settings) == 1
    assert (
        "report.html could not be written: Is a directory; there is a folder where a file belongs"
        in capsys.readouterr().err
    )

"""What a run prints: plain lines in a file and a pipe, a bar and a table on a terminal."""

import io
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from stellarbyte_jax.config import DataConfig, TrainConfig
from stellarbyte_jax.training import console
from stellarbyte_jax.training.console import OUTPUT_CLOSED, Reporter, fitting_metrics, format_metrics

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
NOTES = logging.getLogger("stellarbyte_jax.ops.somewhere")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(tmp_path):
    return tmp_path / "train.log"


@pytest.fixture
def package():
    """The package's logger with a level of the program's own, and a module of it that tells details."""
    package = logging.getLogger("stellarbyte_jax")
    level = package.level
    package.setLevel(logging.ERROR)
    NOTES.setLevel(logging.DEBUG)
    yield package
    NOTES.setLevel(logging.NOTSET)
    package.setLevel(level)


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    shown = Terminal()
    monkeypatch.setattr(console, "sys", SimpleNamespace(stdout=shown))
    return shown


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(console, "time", clock)
    return clock


def logged(log):
    lines = log.read_text(encoding="utf-8").splitlines()
    assert all(re.match(STAMP, line) for line in lines), lines
    return [re.sub(STAMP, "", line, count=1) for line in lines]


def test_a_line_is_printed_and_logged_as_it_is(log, capsys):
    long = "word " * 60 + "end"
    texts = ["plain", "[bold]not markup[/bold] :smile:", long, "春 = {'a': 1}"]
    with Reporter(log) as report:
        for text in texts:
            report.line(text)
        assert logged(log) == texts, "at once"
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts)


CLOSED = """
import pathlib, sys
from stellarbyte_jax.training.console import Reporter
with Reporter(pathlib.Path(sys.argv[1])) as report:
    for text in "abc":
        report.line(text)
    report.table("end", {"loss": "1"})
print("next: what the script says")
"""


def test_a_run_whose_output_nobody_reads_goes_on_and_says_so_once(log):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", CLOSED, str(log)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, f"{OUTPUT_CLOSED}\n")
    assert logged(log) == ["a", "b", "c", "end", "  loss: 1"]


def test_every_line_of_a_text_has_its_time_and_later_runs_append(log, capsys):
    with Reporter(log) as report:
        report.log("one\ntwo")
    with Reporter(log) as report:
        report.log("three")
    assert logged(log) == ["one", "two", "three"]
    assert capsys.readouterr().out == ""


def test_notes_of_the_package_are_shown_once_as_long_as_it_reports(log, package, capsys, request):
    handlers = list(package.handlers)
    NOTES.info("before")
    root = io.StringIO()
    shown_by_another = logging.StreamHandler(root)
    logging.getLogger().addHandler(shown_by_another)
    request.addfinalizer(lambda: logging.getLogger().removeHandler(shown_by_another))
    with Reporter(log):
        NOTES.info("attention: using %s", "xla")
        NOTES.debug("details")
        logging.getLogger("stellarbyte_jax.elsewhere").info("resumed")
        logging.getLogger("another.package").info("not ours")
    logging.getLogger().removeHandler(shown_by_another)
    NOTES.info("after")
    assert root.getvalue() == ""
    assert capsys.readouterr().out == "attention: using xla\nresumed\n"
    assert logged(log) == ["attention: using xla", "resumed"]
    assert (package.level, package.handlers) == (logging.ERROR, handlers)


def test_the_log_is_closed_and_the_package_left_alone_also_after_an_error(log, package):
    handlers = list(package.handlers)
    with pytest.raises(RuntimeError), Reporter(log) as report:
        raise RuntimeError
    assert (package.level, package.handlers) == (logging.ERROR, handlers)
    with pytest.raises(ValueError, match="closed file"):
        report.log("late")


def test_the_settings_other_than_the_defaults_are_printed(log, capsys):
    config = TrainConfig(
        output_dir="a\x1b[2J", steps=200, sample_prompts=("a", "春"), data=DataConfig(train=("x.jsonl",), workers=0)
    )
    with Reporter(log) as report:
        report.config(config)
    lines = capsys.readouterr().out.splitlines()
    assert logged(log) == lines
    assert lines == [
        "settings other than the defaults",
        "  output_dir: a\\x1b[2J",
        "  steps: 200",
        '  sample_prompts: ["a", "春"] (default: [])',
        '  data.train: ["x.jsonl"] (default: [])',
        "  data.workers: 0 (default: 1)",
    ]


def test_a_terminal_has_a_table_of_settings_beside_their_defaults(log, terminal):
    config = TrainConfig(output_dir="runs/[a]", steps=200, ema_decay=0.5, data=DataConfig(workers=0))
    with Reporter(log) as report:
        report.config(config)
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue()).splitlines()
    assert lines[0].strip() == "settings other than the defaults"
    cells = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines if line[:1] in ("┃", "│")]
    assert cells == [
        ["setting", "value", "default"],
        ["output_dir", "runs/[a]", ""],
        ["steps", "200", ""],
        ["ema_decay", "0.5", "none"],
        ["data.workers", "0", "1"],
    ]


def test_a_long_setting_is_folded_and_not_cut(log, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with Reporter(log) as report:
        report.config(TrainConfig(output_dir="x" * 99, steps=200))
    assert terminal.getvalue().count("x") == 99


def test_steps_that_are_due_are_lines_where_there_is_no_terminal(log, capsys):
    with Reporter(log) as report:
        report.start_bar("training", 20, 0)
        report.step(1, 20, {"loss": 3.0}, due=False)
        report.validation(1, 4)
        report.step(2, 20, {"loss": 2.0, "accuracy": 0.25}, due=True)
        report.end_bar()
    assert capsys.readouterr().out == "step 2/20  loss 2.0000  acc 0.250\n"
    assert logged(log) == ["step 2/20  loss 2.0000  acc 0.250"]


def test_a_summary_is_plain_lines_where_there_is_no_terminal(log, capsys):
    with Reporter(log) as report:
        report.table("summary", {"steps": "20", "checkpoint": "run/[20]"})
    lines = ["summary", "  steps: 20", "  checkpoint: run/[20]"]
    assert capsys.readouterr().out.splitlines() == lines
    assert logged(log) == lines


def test_a_terminal_has_a_bar_and_the_log_none_of_it(log, terminal, clock):
    with Reporter(log) as report:
        report.start_bar("training", 20, 7)
        task = report._progress.tasks[0]
        assert (task.description, task.total, task.completed) == ("training", 20, 7)
        clock.now += 1
        report.step(8, 20, {"loss": 3.0}, due=False)
        assert (task.completed, task.fields["numbers"]) == (8, "loss 3.0000")
        clock.now += 0.1
        report.step(9, 20, {"loss": 2.0}, due=False)
        assert task.completed == 8, "it is drawn a few times a second"
        report.validation(1, None)
        assert task.fields["numbers"] == "loss 3.0000"
        report.step(10, 20, {"loss": 1.0}, due=True)
        assert (task.completed, task.fields["numbers"]) == (10, "loss 1.0000")
        clock.now += 1
        report.validation(3, 4)
        assert (task.completed, task.fields["numbers"]) == (10, "validating 3/4")
        clock.now += 0.1
        report.validation(4, 4)
        assert task.fields["numbers"] == "validating 3/4"
        clock.now += 1
        report.validation(5, None)
        assert task.fields["numbers"] == "validating 5"
        report.line("above the bar")
    shown = terminal.getvalue()
    assert "training" in shown and "above the bar\n" in shown and "\x1b" in shown
    assert "step 10/20" not in shown
    assert logged(log) == ["step 10/20  loss 1.0000", "above the bar"]
    assert report._progress is None, "it ends with the report"


NUMBERS = {
    "loss": 5.8612,
    "perplexity": 351.1,
    "accuracy": 0.123,
    "gradient_norm": 1.23,
    "learning_rate": 6e-4,
    "tokens_per_second": 423_000.0,
    "mfu": 0.39,
}


@pytest.mark.parametrize(
    ("columns", "numbers"),
    [
        (48, "loss 5.8612"),
        (60, "loss 5.8612"),
        (80, "loss 5.8612  tok/s 423,000"),
        (100, "loss 5.8612  ppl 351.10  lr 6.00e-04  tok/s 423,000"),
        (150, "loss 5.8612  ppl 351.10  acc 0.123  grad 1.23  lr 6.00e-04  tok/s 423,000  mfu 39.0%"),
    ],
)
def test_a_narrow_terminal_keeps_step_time_and_loss(columns, numbers, log, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with Reporter(log) as report:
        report.start_bar("training", 20_000, 0)
        report.step(4000, 20_000, NUMBERS, due=True)
        report._progress.refresh()
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]+", shown)]
    assert max(map(len, lines)) <= columns
    assert [re.sub("[━╸╺]+", "=", line) for line in lines if "4000" in line] == [
        f"training =  4000/20000 --:-- {numbers}"
    ] * sum("4000" in line for line in lines)
    assert any("4000" in line for line in lines)
    assert logged(log)[0].endswith("mfu 39.0%"), "the log has them all"


def test_the_wait_for_the_first_step_is_explained(log, terminal, capsys):
    with Reporter(log) as report:
        report.compiling()
        report.start_bar("training", 20, 0)
        report.compiling()
        assert report._progress.tasks[0].fields["numbers"] == "compiling the first step"
    assert terminal.getvalue().startswith("compiling the first step\n")
    assert logged(log) == ["compiling the first step"]


def test_a_terminal_has_lines_again_when_the_bar_has_ended(log, terminal, clock):
    with Reporter(log) as report:
        report.start_bar("training", 20, 0)
        report.end_bar()
        report.end_bar()
        begin = len(terminal.getvalue())
        report.step(3, 20, {"loss": 2.0}, due=True)
        assert terminal.getvalue()[begin:] == "step 3/20  loss 2.0000\n"


def test_a_terminal_has_a_table_below_the_bar_that_ended(log, terminal):
    with Reporter(log) as report:
        report.start_bar("training", 20, 0)
        report.table("summary", {"steps": "20", "best": "1.5"})
        assert report._progress is None
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"summary *\n┌─+┬─+┐\n│ steps │ 20  │\n│ best  │ 1.5 │\n└─+┴─+┘\n", shown)
    assert logged(log) == ["summary", "  steps: 20", "  best: 1.5"]


def test_numbers_have_their_form_and_an_order_of_their_own():
    numbers = {
        "skipped_lines": 3.0,
        "mfu": 0.41234,
        "tokens_per_second": 1234567.8,
        "learning_rate": 0.000612,
        "gradient_norm": 1.239,
        "accuracy": 0.1238,
        "bits_per_byte": 1.98768,
        "perplexity": 12.3456,
        "loss": 2.345678,
        "peak_memory_gib": 3.0,
    }
    assert format_metrics(numbers) == (
        "loss 2.3457  ppl 12.35  bits/byte 1.9877  acc 0.124  grad 1.24  lr 6.12e-04  tok/s 1,234,568  mfu 41.2%  "
        "skipped lines 3"
    )
    assert format_metrics({"mfu": 1.0, "loss": float("nan")}) == "loss nan  mfu 100.0%"
    assert format_metrics({}) == format_metrics({"unknown": 1.0}) == ""


def test_a_line_has_two_numbers_of_routers_and_drops_where_there_are_any():
    numbers = {"router/drop_rate": 0.0, "router/max_load": 1.239, "router/load_entropy": 0.98765, "loss": 2.0}
    numbers |= {"router/max_load/3": 1.5, "router/overflow_rate": 0.5, "tokens_per_second": 10.0}
    assert format_metrics(numbers) == "loss 2.0000  tok/s 10  load entropy 0.988  max load 1.24"
    assert format_metrics({**numbers, "router/drop_rate": 0.0312}).endswith("max load 1.24  dropped 3.1%")
    assert fitting_metrics(numbers, 40) == "loss 2.0000  tok/s 10  max load 1.24"
    assert fitting_metrics({**numbers, "router/drop_rate": 0.5}, 38) == "loss 2.0000  tok/s 10  dropped 50.0%"


def test_control_characters_are_spelled_out(tmp_path, capsys):
    with Reporter(tmp_path / "train.log") as report:
        report.line("a\x1b[31mred\x07\x00|\ttab\x9b")
    for text in (capsys.readouterr().out, (tmp_path / "train.log").read_text(encoding="utf-8")):
        assert "a\\x1b[31mred\\x07\\x00|" in text and "tab\\x9b" in text
        assert not {"\x1b", "\x07", "\x00", "\x9b"} & set(text)


def test_numbers_that_just_fit_all_stay():
    whole = format_metrics(NUMBERS)
    assert fitting_metrics(NUMBERS, len(whole)) == whole
    assert fitting_metrics(NUMBERS, len(whole) - 1) == whole.replace("acc 0.123  ", "")


def test_a_long_value_is_folded_and_not_cut(log, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    value = "".join(f"{number:03}" for number in range(60))
    with Reporter(log) as report:
        report.table("summary", {"x" * 40: value})
    cells = re.findall(r"│([^│]*)│([^│]*)│", terminal.getvalue())
    assert "".join(left.strip() for left, _ in cells) == "x" * 40
    assert "".join(right.strip() for _, right in cells) == value


def test_conversations_that_do_not_fit_are_told():
    found = format_metrics({"loss": 1.0, "shortened_conversations": 3.0, "left_out_conversations": 2.0})
    assert found == "loss 1.0000  shortened 3  left out 2"

"""What a run prints: a live bar and tables on a terminal, plain lines elsewhere and in the log file."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from stellarbyte_jax.command import drop_output, spelled
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.reference import REQUIRED, changed, written
from stellarbyte_jax.launch import write_failure

_REDRAW_SECONDS = 0.2
_NARROWEST_BAR = 8  # characters
OUTPUT_CLOSED = "standard output is closed; the run goes on and writes to its train.log"
_package = logging.getLogger("stellarbyte_jax")


class _Notes(logging.Handler):
    """Passes on what the package logs, such as the kernel that ``auto`` chose."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


class _Console(Console):
    """Standard output, which may be closed before the run ends: ``python scripts/train.py ... | head``."""

    def on_broken_pipe(self) -> None:
        """The run goes on, and says so."""
        drop_output()
        print(OUTPUT_CLOSED, file=sys.stderr)


class Reporter:
    """Prints to standard output and appends to a log file, which never sees a control character."""

    def __init__(self, log_path: Path, tells: bool = True) -> None:
        """Opens the log file for appending; a process that ``tells`` nothing, one of several, opens none."""
        log_path = log_path if tells else Path(os.devnull)
        shown = sys.stdout if tells else log_path.open("w", encoding="utf-8")
        self._console = _Console(file=shown, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._path = log_path
        self._log = log_path.open("a", encoding="utf-8")
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._taken = 0  # characters of the bar's line that are no numbers
        self._drawn = 0.0
        self._notes = _Notes(self.line) if tells else logging.NullHandler()
        self._level, self._propagate = _package.level, _package.propagate

    def __enter__(self) -> Self:
        """Begins to show the package's log."""
        _package.addHandler(self._notes)
        _package.setLevel(logging.INFO)
        _package.propagate = False  # a handler that some library gave to the root would print it once more
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the bar and closes the log."""
        _package.removeHandler(self._notes)
        _package.setLevel(self._level)
        _package.propagate = self._propagate
        self.end_bar()
        with contextlib.suppress(OSError):  # of a line that could not be written, which was told
            self._log.close()

    def _print(self, shown: str | Table) -> None:
        try:
            self._console.print(shown)
        except OSError as error:
            raise write_failure(Path("standard output"), error) from error

    def log(self, text: str) -> None:
        """Appends time and text to the log file only."""
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._log.writelines(f"{stamp} {line}\n" for line in text.splitlines())
            self._log.flush()
        except OSError as error:
            raise write_failure(self._path, error) from error

    def line(self, text: str) -> None:
        """Prints a line above the bar, and logs it; control characters, as samples may hold, are spelled out."""
        text = spelled(text)
        self._print(text)
        self.log(text)

    def config(self, config: TrainConfig) -> None:
        """Prints the settings that differ from their defaults, beside these."""
        rows = {
            name: (spelled(written(value)), "" if default is REQUIRED else written(default))
            for name, (value, default) in changed(config).items()
        }
        title = "settings other than the defaults"
        plain = [
            f"  {name}: {value}" + (f" (default: {default})" if default else "")
            for name, (value, default) in rows.items()
        ]
        shown = Table("setting", "value", "default", title=title, title_justify="left")
        for column in shown.columns:
            column.overflow = "fold"
        for name, row in rows.items():
            shown.add_row(name, *row)
        self._table(shown, [title, *plain])

    def start_bar(self, title: str, total: int, done: int) -> None:
        """Shows a bar on a terminal; elsewhere does nothing."""
        if not self._console.is_terminal:
            return
        # Expanded: the bar takes what the other columns leave, and is what grows narrow first.
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._taken = len(title) + 2 * len(str(total)) + len("/  00:00:00  ") + _NARROWEST_BAR + 3
        self._task = self._progress.add_task(title, total=total, completed=done, numbers="")
        self._progress.start()

    def end_bar(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def compiling(self) -> None:
        """Says that the next step takes long, in the bar or as a line."""
        text = "compiling the first step"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, numbers=text)
        else:
            self.line(text)

    def step(self, step: int, total: int, metrics: Mapping[str, float], *, due: bool) -> None:
        """Moves the bar; where the numbers are ``due``, logs them, and prints them if there is no bar."""
        if self._progress is not None and self._task is not None:
            now = time.monotonic()
            if due or now - self._drawn > _REDRAW_SECONDS:
                numbers = fitting_metrics(metrics, self._console.width - self._taken)
                self._progress.update(self._task, completed=step, numbers=numbers)
                self._drawn = now
        if due:
            line = f"step {step}/{total}  {format_metrics(metrics)}"
            if self._progress is None:
                self._print(line)
            self.log(line)

    def validation(self, done: int, total: int | None) -> None:
        """Shows how far a validation is, on a terminal."""
        if self._progress is not None and self._task is not None:
            now = time.monotonic()
            if now - self._drawn > _REDRAW_SECONDS:
                self._progress.update(self._task, numbers=f"validating {done}{f'/{total}' if total else ''}")
                self._drawn = now

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Prints a summary: a table on a terminal, ``name: value`` lines elsewhere."""
        shown = Table(title=title, show_header=False, title_justify="left")
        for _ in range(2):
            shown.add_column(overflow="fold")
        for name, value in rows.items():
            shown.add_row(name, value)
        self._table(shown, [title, *(f"  {name}: {value}" for name, value in rows.items())])

    def _table(self, shown: Table, plain: Sequence[str]) -> None:
        """Prints the table on a terminal, the lines elsewhere and in the log."""
        self.end_bar()
        text = "\n".join(plain)
        self._print(shown if self._console.is_terminal else text)
        self.log(text)


_FORMATS = {
    "loss": ("loss", "{:.4f}"),
    "perplexity": ("ppl", "{:.2f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "accuracy": ("acc", "{:.3f}"),
    "gradient_norm": ("grad", "{:.2f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "skipped_steps": ("skipped steps", "{:.0f}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "mfu": ("mfu", "{:.1%}"),
    "router/load_entropy": ("load entropy", "{:.3f}"),
    "router/max_load": ("max load", "{:.2f}"),
    "router/drop_rate": ("dropped", "{:.1%}"),
    "skipped_lines": ("skipped lines", "{:.0f}"),
    "shortened_conversations": ("shortened", "{:.0f}"),
    "left_out_conversations": ("left out", "{:.0f}"),
}
_IF_ANY = ("router/drop_rate", "skipped_steps")  # not told where it is 0


def format_metrics(metrics: Mapping[str, float]) -> str:
    """The numbers worth a person's eye, in a fixed order."""
    parts = []
    for name, (label, form) in _FORMATS.items():
        if name in metrics and (metrics[name] or name not in _IF_ANY):
            parts.append(f"{label} {form.format(metrics[name])}")
    return "  ".join(parts)


# What a narrow terminal can do without, in the order in which it goes.
_LEFT_OUT = (
    *("accuracy", "router/load_entropy", "router/max_load", "gradient_norm", "mfu", "perplexity", "bits_per_byte"),
    *("learning_rate", "router/drop_rate", "tokens_per_second"),
)


def fitting_metrics(metrics: Mapping[str, float], width: int) -> str:
    """As many of these numbers as ``width`` characters hold; the loss always."""
    left = dict(metrics)
    for name in _LEFT_OUT:
        if len(format_metrics(left)) <= width:
            break
        left.pop(name, None)
    return format_metrics(left)

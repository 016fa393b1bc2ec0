"""What a run left of its course, read back: numbers by step, settings, environment and samples."""

import array
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stellarbyte_jax import __version__
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.foreign import json_object
from stellarbyte_jax.launch import environment_facts
from stellarbyte_jax.training.jsonl import read_lines
from stellarbyte_jax.training.loads import LOADS, Loads, read_loads
from stellarbyte_jax.training.samples import SAMPLES

ABOUT = "about.json"  # in the run's directory
Axis = Literal["steps", "tokens", "time"]
AXES: dict[Axis, str] = {"steps": "step", "tokens": "tokens", "time": "wall_seconds"}  # and their names in a line
_LARGEST = 1e100  # no metric comes near it, and sums of such numbers stay floats
_MOST_NAMES = 2000  # of metrics; a run has a few dozen, and some more for each layer with experts


def about(parameters: int, active: int) -> dict[str, Any]:
    """What :data:`ABOUT` holds: facts that neither settings nor metrics tell.

    Args:
      parameters: of the model.
      active: those of them that one token uses.
    """
    environment = {"stellarbyte_jax": __version__, **environment_facts()}
    return {"parameters": parameters, "active_parameters": active, "environment": environment}


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over a run: ``values`` float64 [N], at ``at[axis]`` float64 [N], NaN where a line lacks it."""

    at: dict[Axis, np.ndarray]
    values: np.ndarray


@dataclass(frozen=True)
class Continuation:
    """One sample of a run."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, eq=False)
class Record:
    """One run.

    Attributes:
      name: how it is called beside others.
      series: by the metric's name, in order of steps.
      config: its settings, where they can be read.
      about: parameters and environment, likewise.
      samples: in order.
      notes: what is missing or was left out, a line each.
      loads: of its experts; None where it has none.
    """

    name: str
    series: dict[str, Series]
    config: TrainConfig | None
    about: dict[str, Any]
    samples: list[Continuation]
    notes: list[str]
    loads: Loads | None = None

    def last(self, name: str) -> float | None:
        """The last value of a metric; None where there is none."""
        return float(self.series[name].values[-1]) if name in self.series else None


def read_record(directory: Path, name: str) -> Record:
    """Reads a run, also one that is under way or of which files are missing.

    Raises:
      ValueError: the directory holds no ``metrics.jsonl``, or none that can be read and has a line with numbers.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the directory of a run (its output_dir) that made its first steps")
    notes: list[str] = []
    try:
        series = _read_metrics(path, notes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    if not series:
        raise ValueError(f"{path} holds no line with numbers: wait for the run's first line (logging.interval)")
    config = None
    if (found := _read_json(directory / "train_config.json", notes)) is not None:
        try:
            config = TrainConfig.from_dict(found)
        except ValueError as error:
            notes.append(f"settings are not shown: {directory / 'train_config.json'}: {error}")
    facts = _read_json(directory / ABOUT, notes) or {}
    samples, loads = _read_samples(directory / SAMPLES, notes), read_loads(directory / LOADS, notes)
    return Record(name, series, config, facts, samples, notes, loads)


def setting(config: TrainConfig, name: str) -> Any:
    """The value of a setting such as ``data.train``."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


@dataclass
class _Columns:
    """Numbers of lines, in a few bytes each: a run may have a million lines."""

    at: dict[Axis, array.array] = field(default_factory=lambda: {axis: array.array("d") for axis in AXES})
    lines: dict[str, array.array] = field(default_factory=dict)
    values: dict[str, array.array] = field(default_factory=dict)

    def add(self, line: dict[str, Any]) -> int:
        """Takes a line; how many of its values were left out."""
        number, left_out = len(self.at["steps"]), 0
        for axis, name in AXES.items():
            value = _number(line.get(name))
            self.at[axis].append(math.nan if value is None else value)
        for name in line.keys() - AXES.values():
            value = _number(line[name])
            if value is None or (name not in self.values and len(self.values) >= _MOST_NAMES):
                left_out += 1
                continue
            self.lines.setdefault(name, array.array("q")).append(number)
            self.values.setdefault(name, array.array("d")).append(value)
        return left_out

    def series(self) -> dict[str, Series]:
        """By name, in order of steps."""
        at: dict[Axis, np.ndarray] = {axis: np.asarray(column) for axis, column in self.at.items()}
        made: dict[str, Series] = {}
        for name, lines in self.lines.items():
            index = np.asarray(lines)
            order = np.argsort(at["steps"][index], kind="stable")
            there: dict[Axis, np.ndarray] = {axis: column[index][order] for axis, column in at.items()}
            made[name] = Series(there, np.asarray(self.values[name])[order])
        return made


def _read_metrics(path: Path, notes: list[str]) -> dict[str, Series]:
    columns, damaged, left_out = _Columns(), 0, 0
    for _, line in read_lines(path):
        if line is None:
            damaged += 1
            continue
        left_out += columns.add(line)
    if damaged:
        notes.append(f"{path}: {damaged:,} damaged line{'s were' if damaged > 1 else ' was'} skipped")
    if left_out:
        notes.append(f"{path}: {left_out:,} values that are no finite number were left out")
    return columns.series()


def _number(value: object) -> float | None:
    """The number as a float; None for what is none, not finite, or too large to draw."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None  # false for NaN


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        return json_object(path.read_bytes(), str(path))
    except FileNotFoundError:
        notes.append(f"{path} is missing")
    except (OSError, ValueError) as error:
        notes.append(str(error))
    return None


def _read_samples(path: Path, notes: list[str]) -> list[Continuation]:
    if not path.is_file():
        return []  # a run without prompts has none
    found, damaged = [], 0
    try:
        lines = list(read_lines(path))
    except OSError as error:
        notes.append(f"{path} cannot be read: {error.strerror}")
        return []
    for _, line in lines:
        texts = [line.get("prompt"), line.get("text")] if line is not None else [None]
        if line is None or not all(isinstance(text, str) for text in texts):
            damaged += 1
            continue
        found.append(Continuation(line["step"], *map(str, texts)))
    if damaged:
        notes.append(f"{path}: {damaged:,} damaged line{'s were' if damaged > 1 else ' was'} skipped")
    return found

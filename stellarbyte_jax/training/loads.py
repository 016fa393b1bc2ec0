"""The load of every expert over a run: the file that keeps it, written line by line and read back.

S lines, L layers with experts, E experts.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.launch import processes, write_failure
from stellarbyte_jax.training.jsonl import keep_lines, read_lines

LOADS = "router_load.jsonl"  # in the run's directory
_DIGITS = 4  # that count, of a share
_LONGEST_NUMBER = 6  # of a layer, in characters
_LAST_STEP = 2**53  # above it, floats do not count


class LoadFile:
    """``router_load.jsonl``: a line whenever metrics are logged, of that step, ``{"step", "load": {LAYER: shares}}``.

    The shares of a layer are those of the choices that its experts took, and add up to one. On resume, lines past the
    step resumed from are dropped: they will be written again. A run without experts has no such file.
    """

    def __init__(self, config: TrainConfig, start_step: int) -> None:
        """Opens the file for the steps after ``start_step``."""
        self._layers = config.model.moe_layers
        self._path = Path(config.output_dir) / LOADS
        self._file = None
        if self._layers and processes.is_main():
            keep_lines(self._path, lambda line: line["step"] <= start_step)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, loads_LE: np.ndarray | None) -> None:
        """Appends a line; None, of a network without experts, writes none."""
        if self._file is None or loads_LE is None:
            return
        load = {str(layer): _rounded(row) for layer, row in zip(self._layers, loads_LE, strict=True)}
        try:
            self._file.write(json.dumps({"step": step, "load": load}, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_failure(self._path, error) from error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a line that could not be written, which was told
                self._file.close()


def _rounded(shares: np.ndarray) -> list[float]:
    return [float(f"{x:.{_DIGITS}g}") for x in shares.tolist()]


@dataclass(frozen=True, eq=False)
class Loads:
    """What the file of a run holds.

    Attributes:
      steps: [S], in order.
      layers: numbers of the L layers.
      shares_SLE: float32.
    """

    steps: np.ndarray
    layers: tuple[int, ...]
    shares_SLE: np.ndarray


def read_loads(path: Path, notes: list[str]) -> Loads | None:
    """Reads the file of a run; None where there is none, or nothing in it. What was left out goes into ``notes``."""
    if not path.is_file():
        return None  # a run without experts has none
    found: dict[int, np.ndarray] = {}
    layers, damaged = None, 0
    try:
        for _, line in read_lines(path):
            row = None if line is None else _row(line)
            if line is None or row is None or (layers is not None and (row[0], row[1].shape) != layers):
                damaged += 1
                continue
            layers = (row[0], row[1].shape)
            found[line["step"]] = row[1]
    except OSError as error:
        notes.append(f"{path} cannot be read: {error.strerror}")
        return None
    if damaged:
        notes.append(f"{path}: {damaged:,} damaged line{'s were' if damaged > 1 else ' was'} skipped")
    if layers is None:
        return None
    steps = sorted(found)
    return Loads(np.array(steps, float), layers[0], np.stack([found[step] for step in steps]))


def _row(line: dict[str, Any]) -> tuple[tuple[int, ...], np.ndarray] | None:
    """The layers of a line, and their shares [L, E]; None where these are none."""
    load = line.get("load")
    if not isinstance(load, dict) or not load or not 0 <= line["step"] < _LAST_STEP:
        return None
    if not all(name.isdecimal() and len(name) <= _LONGEST_NUMBER for name in load):
        return None
    rows = list(load.values())
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(widths) != 1 or widths == {0}:
        return None
    if not all(type(x) in (int, float) and 0 <= x <= 1 for row in rows for x in row):
        return None
    return tuple(map(int, load)), np.array(rows, np.float32)

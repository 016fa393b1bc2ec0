"""The notebook, run as it stands there, in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.xla import QUICK

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text(encoding="utf-8"))


def code():
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def shortened(cells):
    """The cells with fewer steps of training."""
    steps, fewer = '"steps=40",', '"steps=4", "schedule.warmup_steps=1", "data.workers=0",'
    assert sum(steps in cell for cell in cells) == 1
    return [cell.replace(steps, fewer) for cell in cells]


def test_it_holds_no_output_of_some_machine():
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    """Twice over: a cell that is run again does no harm."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install -e '.[report]'")
    cells = "\n".join(
        f"exec(compile({cell!r}, 'cell {number}', 'exec'))" for number, cell in enumerate(shortened(code()), 1)
    )
    program = "import matplotlib\nmatplotlib.use('agg')\nfor _ in range(2):\n    " + cells.replace("\n", "\n    ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training loss 1" in done.stdout and "The whale" in done.stdout and "llama\n" in done.stdout
    assert "] <|SBOS|>The whale 春風\n" in done.stdout, "decoded by transformers"
    assert "the run in runs/notebook is complete" in done.stdout
    assert (tmp_path / "runs" / "notebook-hf" / "model.safetensors").is_file()

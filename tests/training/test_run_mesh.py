"""A run on a mesh: from the first step to the export, and on another mesh from a checkpoint. On eight CPU devices."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers.runs import cli, write_config

from stellarbyte_jax.training import placement

COMMON = (
    "steps=6",
    "optimizer.name=muon",
    "global_batch_size=8",
    "checkpoint.interval=3",
    "evaluation.interval=3",
    "model.hidden_dropout=0",
)


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in ("loss", "validation/loss") if name in line}


def test_a_run_goes_on_on_another_mesh(tmp_path, capsys):
    config = write_config(tmp_path)
    assert cli(config, *COMMON, "mesh.data=1", f"output_dir={tmp_path / 'one'}") == 0
    assert "mesh data=1: uses 1 of 8 devices" in capsys.readouterr().out
    expected = losses(tmp_path / "one")
    assert {step for step, _ in expected} == {1, 2, 3, 4, 5, 6}
    run = tmp_path / "many"
    split = (*COMMON, f"output_dir={run}", "export_at_end=true", 'sample_prompts=["a"]')
    assert cli(config, *split, "mesh.fsdp=2", "mesh.tensor=2") == 0
    assert "mesh data=2 x fsdp=2 x tensor=2: uses 8 of 8 devices" in capsys.readouterr().out
    first = losses(run)
    assert first.keys() == expected.keys()
    np.testing.assert_allclose(list(first.values()), list(expected.values()), rtol=1e-4)
    assert (run / "hf" / "model.safetensors").exists()
    shutil.rmtree(run / "checkpoints" / "6")
    assert cli(config, *split, "mesh.data=2", "mesh.context=2") == 0
    out = capsys.readouterr().out
    assert "mesh data=2 x context=2: uses 4 of 8 devices" in out and "resumed at step 3" in out
    np.testing.assert_allclose(list(losses(run).values()), list(expected.values()), rtol=1e-4)


def test_a_mesh_that_does_not_fit_is_told_before_anything_is_made(tmp_path, capsys):
    config = write_config(tmp_path)
    assert cli(config, "mesh.data=8") == 2
    assert (
        "error: mesh.data=8 cuts the rows of a batch, and global_batch_size=4 does not divide"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_processes_that_were_joined_elsewhere_are_refused(tmp_path, capsys, monkeypatch):
    """Each would take itself for the only one, and write all files."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert cli(write_config(tmp_path), *COMMON) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "stellarbyte_jax.launch.processes.join" in error
    assert not (tmp_path / "run").exists()

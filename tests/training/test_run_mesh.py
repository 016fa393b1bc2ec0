"""A run on a mesh: from the first step to the export, and on another mesh from a checkpoint. On eight CPU devices."""

import contextlib
import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.runs import cli, write_config
from helpers.training import MODEL, settings, some_weights

from stellarbyte_jax.checkpoint.store import Checkpointer
from stellarbyte_jax.checkpoint.weights import save_initial
from stellarbyte_jax.config import CheckpointConfig, MemoryConfig, MeshConfig, load
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import begin, placement, resume, run
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.programs import compiled_create_state
from stellarbyte_jax.training.resume import Progress
from stellarbyte_jax.training.state import state_shapes

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
    many = tmp_path / "many"
    split, end = (*COMMON, f"output_dir={many}"), ("export_at_end=true", 'sample_prompts=["a"]')
    assert cli(config, *split, *end, "mesh.fsdp=2", "mesh.tensor=2") == 0
    assert "mesh data=2 x fsdp=2 x tensor=2: uses 8 of 8 devices" in capsys.readouterr().out
    first = losses(many)
    assert first.keys() == expected.keys()
    np.testing.assert_allclose(list(first.values()), list(expected.values()), rtol=1e-4)
    assert (many / "hf" / "model.safetensors").exists()
    shutil.rmtree(many / "checkpoints" / "6")
    assert cli(config, *split, "mesh.data=2", "mesh.context=2") == 0
    out = capsys.readouterr().out
    assert "mesh data=2 x context=2: uses 4 of 8 devices" in out and "resumed at step 3" in out
    np.testing.assert_allclose(list(losses(many).values()), list(expected.values()), rtol=1e-4)


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


def what_validation_carries(monkeypatch):
    """The arrays that validations of runs are given, and give back, from batch to batch."""
    seen, original = [], run.evaluate

    def watched(run_eval, params, batches, limit, report, state, stopped):
        def kept(*args):
            sums, after = run_eval(*args)
            seen.extend(jax.tree.leaves((args[2], after)))
            return sums, after

        return original(kept, params, batches, limit, report, state, stopped)

    monkeypatch.setattr(run, "evaluate", watched)
    return seen


def held_since(before):
    """Bytes on the first device, of arrays that were not there before."""
    new = [x for x in jax.live_arrays() if not any(x is other for other in before)]
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in new
        if jax.devices()[0] in x.sharding.device_set
    )


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_checkpoint_is_read_in_parts(mesh, tmp_path, monkeypatch):
    """Of one device, and on a mesh: orbax is asked for each part where it stays, and makes nothing else."""
    model = dataclasses.replace(MODEL, vocab_size=64, num_attention_heads=8)
    one = settings(model=model, global_batch_size=8, ema_decay=0.9, mesh=MeshConfig(data=1))
    many = dataclasses.replace(one, mesh=MeshConfig(**{"data": 1, **mesh}))
    network = ByteTransformer(model)
    rule = make_optimizer(one, network)
    shapes = state_shapes(one, network, rule)
    state = compiled_create_state(one, network, rule, shapes)()
    asked, held, read = [], [], ocp.CheckpointManager.restore

    def watched(self, step, args=None, **kwargs):
        found = read(self, step, args=args, **kwargs)
        wanted = [each.item for each in args.values() if isinstance(each, ocp.args.StandardRestore)]
        if wanted:
            asked.extend(jax.tree.leaves(wanted))
            held.append(held_since(before))
        return found

    monkeypatch.setattr(ocp.CheckpointManager, "restore", watched)
    with contextlib.closing(Checkpointer(tmp_path / "run", CheckpointConfig())) as checkpointer:
        resume.save(checkpointer, one, state, 1, {}, Progress())
        checkpointer.wait()
        with placement.on_mesh(placement.mesh_of(many)):
            wanted = placement.placed(shapes, network, rule)
            before = jax.live_arrays()
            found = resume.restore(checkpointer, many, wanted, rule, print)
    assert found is not None
    parts = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(wanted))
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held == [parts] and parts < 1.1 * whole / math.prod(mesh.values()) * mesh.get("data", 1)
    places = sorted((str(x.shape), str(x.sharding.spec)) for x in jax.tree.leaves(wanted))
    assert sorted((str(x.shape), str(x.sharding.spec)) for x in asked) == places
    for leaf, place, first in zip(*map(jax.tree.leaves, (found.state, wanted, state)), strict=True):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, first)


@pytest.mark.parametrize("kind", ["directory", "run"])
def test_a_run_begins_with_weights_of_which_each_device_holds_its_part(kind, tmp_path, monkeypatch):
    """Nothing else lies on a device when the state is made, and a warning about donated arrays would be an error."""
    memory = MemoryConfig(length=8 if kind == "run" else 0)  # which no directory has
    model = dataclasses.replace(load(str(write_config(tmp_path))).model, memory=memory, num_hidden_layers=6)
    network = ByteTransformer(model)
    params = some_weights(model)
    source = tmp_path / "weights"
    if kind == "run":
        save_initial(source, model, params, str(tmp_path.parent / "byte_tokenizer"))
    else:
        save_pretrained(source, network, params, tokenizer=tmp_path.parent / "byte_tokenizer")
    begun = []
    original, whole = begin.begin_with, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    before = jax.live_arrays()

    def watched(weights, config, shapes, optimizer):
        held = held_since(before)
        found = original(weights, config, shapes, optimizer)
        begun.append((held, found.state, shapes))
        return found

    monkeypatch.setattr(begin, "begin_with", watched)
    settings = (*COMMON, "steps=1", "schedule.warmup_steps=0", "model.compute_dtype=float32", "optimizer.name=adamw")
    if kind == "run":
        settings += ("model.memory.length=8", "data.arrangement=contiguous")
        validated = what_validation_carries(monkeypatch)
    else:
        settings += ("data.validation=[]", "evaluation.interval=500", "evaluation.batches=50")
    assert cli(tmp_path / "tiny.py", *settings, "mesh.fsdp=8", f"init_from={source}") == 0
    ((held, state, shapes),) = begun
    assert 0 < held < 1.3 * whole / 8  # vectors are whole
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    if kind == "run":
        slots = state.carried.memory.groups[0][0].states
        assert slots.sharding.shard_shape(slots.shape)[1] == slots.shape[1] // 8  # rows
        assert len(validated) >= 12 and all(len(leaf.sharding.device_set) == 8 for leaf in validated)
        assert all(not leaf.is_fully_replicated for leaf in validated), "its memory lies in parts too"

"""Whole runs of models with experts: exact resume of what routers keep, which only steps of training change."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers.runs import cli, log_of, same_weights, write_config
from helpers.training import flat

from stellarbyte_jax.checkpoint.weights import load_config, load_weights
from stellarbyte_jax.inspect.costs import flops_per_token, parameter_counts
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import begin, metrics
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.state import state_shapes

EXPERTS = {"num_experts": 4, "intermediate_size": 8, "bias_update_rate": 0.01, "noise": "gumbel", "cooling_steps": 3}
EXPERTS |= {"router_warmup_steps": 3, "expert_priority": "true", "first_k_dense_replace": 1, "state_decay": 0.5}
SETTINGS = (
    *(f"model.moe.{name}={value}" for name, value in EXPERTS.items()),
    "gradient_accumulation_steps=2",
    "steps=5",
    "checkpoint.interval=2",
    "checkpoint.keep_latest=9",
)


def kept_of(weights):
    return {path: x for path, x in flat(weights).items() if "/tracked/" in path}


def test_resume_with_experts_is_exact_and_nothing_but_steps_changes_what_routers_keep(tmp_path, capsys, monkeypatch):
    """Five steps with validations and samples among them, against two, a lost run, and three more without any."""
    straight, run = write_config(tmp_path), tmp_path / "run"
    between = ("evaluation.interval=1", "sample_prompts=ab", "sample_interval=1")
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e12)
    assert cli(straight, *SETTINGS, *between) == 0
    config, weights = load_weights(run)
    counts = parameter_counts(ByteTransformer(config.model))
    sizes = f"{counts.total:,} parameters, {counts.active:,} active; 128 tokens a step"
    said, about = capsys.readouterr().out, json.loads((run / "about.json").read_text())
    assert sizes in said and f"{counts.total:,}, {counts.active:,} active" in said.partition("summary")[2]
    assert (about["parameters"], about["active_parameters"]) == (counts.total, counts.active)
    assert counts.total - counts.active == 2 * 3 * 16 * 8
    last = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "mfu" in line][-1]
    flops = flops_per_token(config.model, counts.active, 32).causal
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * flops / 1e12, rel=1e-6)
    kept = kept_of(weights)
    assert len(kept) == 6 and (kept["layers/1/moe/router/tracked/steps"] == 5).all()
    for name, first in (("bias", 0), ("load", 0.25), ("utilization", 0.5), ("priority", 1)):
        assert np.any(kept[f"layers/1/moe/router/tracked/{name}"] != first), name
    losses = log_of(run)[0]
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / str(step))
    assert cli(straight, *SETTINGS, "evaluation.interval=100") == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert log_of(run)[0] == losses
    assert same_weights(load_weights(run)[1], weights)
    begins_with_what_routers_kept(run, tmp_path, weights)


def begins_with_what_routers_kept(run, tmp_path, weights):
    """A run that begins with these weights, and one that splits experts besides."""
    config = dataclasses.replace(load_config(run), output_dir=str(tmp_path / "second"), init_from=str(run))
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    found = begin.from_weights(config, state_shapes(config, model, optimizer), optimizer, lambda line: None)
    assert found is not None and int(found.state.step) == 0
    assert same_weights(found.state.frozen, kept_tree(weights)) and same_weights(found.state.weights, weights)
    moe = dataclasses.replace(config.model.moe, rebalance_interval=5)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    found = begin.from_weights(config, state_shapes(config, model, optimizer), optimizer, lambda line: None)
    assert found is not None
    tracked = found.state.frozen["layers"]["1"]["moe"]["router"]["tracked"]
    assert tracked["twin"].tolist() == [[0, 1, 2, 3]] and not np.any(tracked["twin_steps"])
    np.testing.assert_array_equal(tracked["load"], kept_of(weights)["layers/1/moe/router/tracked/load"])


def kept_tree(weights):
    router = weights["layers"]["1"]["moe"]["router"]
    return {"layers": {"1": {"moe": {"router": {"tracked": jax.tree.map(np.asarray, router["tracked"])}}}}}

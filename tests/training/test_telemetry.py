"""What routers did, as numbers: beside numpy on tallies made by hand, in a step, and in the files of whole runs."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import cli, log_of, write_config
from helpers.training import MODEL, compiled_step, first_state, packed_batch, settings

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model.moe import Sent, counted
from stellarbyte_jax.model.router import Decision
from stellarbyte_jax.model.state.router import Tally, tracked_loads
from stellarbyte_jax.ops.balance import Routed
from stellarbyte_jax.ops.routing import Choices
from stellarbyte_jax.training.telemetry import BY_LAYER, LOADS, layer_numbers, router_metrics

DOCS = Path(__file__).parents[2] / "docs" / "runs.md"


def tally(counts, wanted, moved=None, temperature=None, tokens=None):
    """A tally of layers, in which what was wanted and not taken is lost."""
    counts, wanted = np.array(counts, np.float32), np.array(wanted, np.float32)
    L = len(counts)
    lost = wanted.sum(axis=1) - counts.sum(axis=1)
    tokens = np.ones(L) if tokens is None else np.array(tokens)
    temperature = tokens if temperature is None else np.array(temperature) * tokens
    parts = (counts, wanted, tokens, lost, counts, temperature, np.zeros(L) if moved is None else np.array(moved))
    return Tally(*(jax.device_put(np.asarray(x, np.float32)) for x in parts))


def metrics_of(tally, running=None):
    running = np.full(tally.counts.shape, 1 / tally.counts.shape[1]) if running is None else np.array(running)
    found = router_metrics(tally, jax.device_put(np.asarray(running, np.float32)))
    assert found.keys() == {*BY_LAYER, LOADS}
    return {name: np.asarray(x) for name, x in found.items()}


def test_numbers_are_those_of_numpy():
    random = np.random.default_rng(0)
    wanted = random.integers(1, 50, (3, 6)).astype(np.float64)
    counts = np.minimum(wanted, 20) + np.array([[0, 0, 0, 0, 0, 2.0]] * 3)
    counts[1, 2] = 0
    running = random.dirichlet(np.ones(6), 3)
    running[2, :4] = [0.0015, 0.00167, 0.0, 0.3]  # of 1/600: below, above, below, above
    moved, tokens, temperature = [2.0, 0.0, 1.0], [10.0, 20.0, 30.0], [1.0, 0.5, 2.0]
    found = metrics_of(tally(counts, wanted, moved, temperature, tokens), running)
    for layer in range(3):
        share, asked = counts[layer] / counts[layer].sum(), wanted[layer].sum()
        lost = asked - counts[layer].sum()
        entropy = -sum(p * np.log(p) for p in share if p > 0) / np.log(6)
        expected = {
            "router/load_entropy": entropy,
            "router/max_load": counts[layer].max() / counts[layer].mean(),
            "router/max_wanted": wanted[layer].max() / wanted[layer].mean(),
            "router/overflow_rate": (moved[layer] + lost) / asked,
            "router/drop_rate": lost / asked,
            "router/dead_experts": sum(running[layer] < 0.01 / 6),
            "router/idle_experts": layer == 1,
            "router/temperature": temperature[layer],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][layer], value, rtol=1e-6, err_msg=f"{name} of {layer}")
        np.testing.assert_allclose(found[LOADS][layer], share, rtol=1e-6)
    assert found["router/dead_experts"][2] == 2


@pytest.mark.parametrize(
    ("counts", "entropy", "most", "idle"),
    [([5, 5, 5, 5], 1, 1, 0), ([7, 0, 0, 0], 0, 4, 3), ([0, 3, 3, 0], 0.5, 2, 2), ([7], 1, 1, 0), ([0, 0], 0, 0, 2)],
)
def test_an_even_load_has_entropy_1_and_a_step_without_tokens_zeros(counts, entropy, most, idle):
    found = metrics_of(tally([counts], [counts]))
    assert [
        float(found[f"router/{name}"][0]) for name in ("load_entropy", "max_load", "idle_experts")
    ] == pytest.approx([entropy, most, idle], abs=1e-6)
    assert all(np.all(np.isfinite(x)) for x in found.values())
    assert found["router/overflow_rate"] == found["router/drop_rate"] == 0


def test_layers_have_their_numbers_and_the_whole_is_their_mean_or_the_greatest():
    values = {name: np.array([0.25, 0.75]) + i for i, name in enumerate(BY_LAYER)}
    found = layer_numbers({**values, "loss": np.float32(3)}, (1, 11))
    assert len(found) == 3 * len(BY_LAYER)
    for i, name in enumerate(BY_LAYER):
        whole = 0.75 if name in ("router/max_load", "router/max_wanted") else 0.5
        assert (found[name], found[f"{name}/1"], found[f"{name}/11"]) == (whole + i, 0.25 + i, 0.75 + i)
    assert layer_numbers({"loss": np.float32(3)}, ()) == {}


def test_a_tally_counts_what_another_expert_took():
    """Of four experts; 4 is none. Two choices were moved, one was lost, three were never made."""
    wanted = np.array([[0, 1], [0, 2], [0, 4], [4, 4]], np.int32)
    taken = np.array([[0, 1], [3, 2], [2, 4], [4, 4]], np.int32)
    taken[1, 1] = 4
    nothing = jnp.zeros((4, 4))
    choices = Choices(jax.device_put(wanted), jnp.ones((4, 2)), jnp.ones(4))
    mask = jnp.array([True, True, True, False])
    decision = Decision(
        choices, Routed(nothing, nothing, choices.experts_NK, mask, 1), jnp.float32(0.5), nothing[0], None
    )
    sent = Sent(jax.device_put(taken), jnp.float32(9))
    one = Tally(*[jnp.ones(4), jnp.ones(4), *[jnp.float32(1)] * 2, jnp.ones(4), *[jnp.float32(1)] * 2])
    found = counted(one, decision, sent, jnp.array([3.0, 1, 1, 0]))
    assert (float(found.moved), float(found.lost), float(found.tokens)) == (3, 2, 4), "beside what was there before"
    assert found.counts.tolist() == [2, 2, 2, 2] and found.wanted.tolist() == [4, 2, 2, 1]
    assert float(found.temperature) == 1 + 0.5 * 3


def experts(layers, parts=1, **moe):
    model = dataclasses.replace(MODEL, num_hidden_layers=layers, moe={"num_experts": 4, "intermediate_size": 16, **moe})
    return settings(model=model, gradient_accumulation_steps=parts)


FULL = {"dispatch": "capacity", "capacity_factor": 0.6, "min_capacity": 1}
SPLIT = experts(3, mlp_only_layers=(1,))  # two stacks of experts
POOL = experts(
    4, 2, decoder_sparse_step=2, shared_pool=True, overflow=("next_best",), **{**FULL, "capacity_factor": 0.65}
)


@pytest.mark.parametrize("config", [SPLIT, POOL], ids=["split", "shared pool"])
def test_a_step_tells_the_loads_of_each_layer(config):
    """They are those that the running means moved to, which lie with the weights of the layer."""
    after, metrics = compiled_step(config)(first_state(config), packed_batch())
    loads = np.asarray(metrics[LOADS])
    assert loads.shape == (2, 4) and loads[0].tolist() != loads[1].tolist(), "equal layers would say nothing"
    running = np.asarray(tracked_loads(config.model, after.weights))
    for number, layer in enumerate(config.model.moe_layers):
        stack, row = config.model.layer_places[layer]
        kept = after.weights["layers"][str(stack)]["moe"]["router"]["tracked"]["load"][row]
        np.testing.assert_allclose((kept - 0.9 / 4) / 0.1, loads[number], atol=1e-5)
        np.testing.assert_array_equal(running[number], kept)
    np.testing.assert_allclose(metrics["router/max_load"], 4 * loads.max(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(metrics["router/temperature"], [1, 1])


def test_choices_move_or_drop_where_there_is_a_capacity():
    free, full = (compiled_step(config)(first_state(config), packed_batch())[1] for config in (SPLIT, POOL))
    assert np.all(free["router/drop_rate"] == 0) and np.all(free["router/overflow_rate"] == 0)
    np.testing.assert_array_equal(free["router/max_load"], free["router/max_wanted"])
    assert np.all(full["router/drop_rate"] > 0) and np.all(full["router/overflow_rate"] > full["router/drop_rate"])
    assert np.all(full["router/max_wanted"] > full["router/max_load"])


def test_an_expert_is_dead_where_its_running_mean_is_low_after_the_step():
    """Before the step all of them were; equal tokens without positions go to two experts of each layer."""
    state = first_state(SPLIT)
    none = jax.tree.map(jnp.zeros_like, state.frozen)
    tokens = np.zeros((4, 16), np.int32)
    metrics = compiled_step(SPLIT)(
        state.replace(frozen=none), {"tokens": tokens, "positions": tokens, "segment_ids": tokens + 1}
    )[1]
    assert metrics["router/dead_experts"].tolist() == metrics["router/idle_experts"].tolist() == [2, 2]
    np.testing.assert_allclose(metrics["router/load_entropy"], 0.5, rtol=1e-6)


def test_losses_of_routers_stand_beside_their_metrics_under_the_names_of_their_weights():
    metrics = compiled_step(SPLIT)(first_state(SPLIT), packed_batch())[1]
    weights = {name for name in LossConfig().to_dict() if name.startswith("router_")}
    assert {f"router_{name[12:]}" for name in metrics if name.startswith("router/loss/")} == weights
    assert not [name for name in metrics if name.startswith("router_")]
    expected = float(metrics["cross_entropy"]) + SPLIT.loss.router_load * float(metrics["router/loss/load"])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)


RUN = (
    *("model.num_hidden_layers=3", "model.moe.num_experts=4", "model.moe.first_k_dense_replace=1"),
    *("model.moe.dispatch=capacity", "model.moe.capacity_factor=0.6", "model.moe.overflow=next_best"),
    *("steps=6", "logging.interval=2", "checkpoint.interval=2", "checkpoint.keep_latest=9", "evaluation.interval=3"),
)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Writer:
    """In place of the one of tensorboardX: keeps scalars."""

    scalars: ClassVar[dict[int, dict[str, float]]] = {}

    def __init__(self, directory, purge_step):
        pass

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(step, {})[name] = value

    def flush(self):
        pass

    close = flush


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory):
    """A run of six steps with experts in layers 1 and 2, its config file, and what it printed."""
    directory = tmp_path_factory.mktemp("with_experts")
    config_file = write_config(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
        assert cli(config_file, *RUN, "logging.trackers=tensorboard") == 0
    return config_file, directory / "run"


def test_trackers_get_what_stands_in_metrics_of_each_layer(with_experts):
    lines = [line for line in lines_of(with_experts[1] / "metrics.jsonl") if "loss" in line]
    for line in lines:
        sent = Writer.scalars[line["step"]]
        of_routers = {name: value for name, value in line.items() if name.startswith("router/")}
        assert {f"{name}/{layer}" for name in BY_LAYER for layer in (1, 2)} < of_routers.keys()
        assert {name: value for name, value in sent.items() if name.startswith("router/")} == of_routers


def test_a_run_writes_each_metric_by_layer(with_experts):
    lines = [line for line in lines_of(with_experts[1] / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        for name in BY_LAYER:
            of_layers = [line[f"{name}/{layer}"] for layer in (1, 2)]
            whole = max(of_layers) if "/max_" in name else np.mean(of_layers)
            assert line[name] == pytest.approx(whole, rel=1e-6)
        assert not {f"{name}/0" for name in BY_LAYER} & line.keys()
        assert not [name for name in line if name.startswith(LOADS)]
        assert line["router/overflow_rate"] >= line["router/drop_rate"] > 0
    assert not [
        name for line in lines_of(with_experts[1] / "metrics.jsonl") for name in line if "validation/router" in name
    ]


def test_a_run_shows_the_means_that_matter_on_a_line(with_experts):
    log = (with_experts[1] / "train.log").read_text(encoding="utf-8")
    steps = re.findall(r"step \d+/6  loss .*", log)
    assert len(steps) == 3
    for line in steps:
        assert re.search(r"  load entropy [01]\.\d{3}  max load \d\.\d\d  dropped \d+\.\d%$", line), line


def test_a_run_keeps_the_load_of_each_expert(with_experts):
    run = with_experts[1]
    metrics = {line["step"]: line for line in lines_of(run / "metrics.jsonl") if "loss" in line}
    lines = lines_of(run / "router_load.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line.keys() == {"step", "load"} and list(line["load"]) == ["1", "2"]
        for layer, shares in line["load"].items():
            assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=1e-3)
            assert all(float(f"{x:.4g}") == x for x in shares)
            assert 4 * max(shares) == pytest.approx(metrics[line["step"]][f"router/max_load/{layer}"], rel=1e-3)


def test_a_resumed_run_has_each_line_once(with_experts, tmp_path):
    """Four steps, a lost one, and a file that the kill cut short: it ends as that of the run without interruption."""
    shutil.copytree(with_experts[1], tmp_path / "run")
    run, config_file = tmp_path / "run", write_config(tmp_path)
    expected = (run / "router_load.jsonl").read_bytes()
    for step in (run / "checkpoints").iterdir():
        if step.name != "4":
            shutil.rmtree(step)
    with (run / "router_load.jsonl").open("ab") as damaged:
        damaged.write(b'{"step":8,"lo')
    assert cli(config_file, *RUN) == 0
    assert (run / "router_load.jsonl").read_bytes() == expected
    assert log_of(run) == log_of(with_experts[1])


def test_the_end_of_a_run_draws_the_loads_and_a_report_shows_them(with_experts, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install -e '.[report]'")
    shutil.copytree(with_experts[1], tmp_path / "run")
    picture = tmp_path / "run" / "router_load.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "load of experts: " in (with_experts[1] / "train.log").read_text(encoding="utf-8")
    picture.unlink()
    assert cli(write_config(tmp_path), *RUN, "report_at_end=true") == 0
    assert f"load of experts: {picture}" in capsys.readouterr().out and picture.is_file()
    assert ">Load of experts</h2>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_every_file_and_metric_of_a_run_is_explained(with_experts):
    text = DOCS.read_text(encoding="utf-8")
    explained = set(re.findall(r"`([^`]+)`", " ".join(line for line in text.splitlines() if line.startswith("|"))))
    run = with_experts[1]
    files = {f"{path.name}/" if path.is_dir() else path.name for path in run.iterdir()}
    assert files - {name.partition("STEP")[0] for name in explained} == set()
    names = {name for line in lines_of(run / "metrics.jsonl") for name in line} - {"step"}
    assert {re.sub(r"/\d+$", "", name) for name in names} - explained == set()
    assert set(BY_LAYER) <= explained


def test_a_run_without_experts_has_none_of_it(straight):
    assert not (straight / "router_load.jsonl").exists()
    assert not [name for line in lines_of(straight / "metrics.jsonl") for name in line if name.startswith("router")]
    assert "load entropy" not in (straight / "train.log").read_text(encoding="utf-8")

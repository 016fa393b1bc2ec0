"""Overloaded experts are split and idle ones merged: which, with what they have, and that nothing else changes."""

import dataclasses
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.runs import CONSTANT, at_step, cli, log_of, same_weights, write_config
from helpers.training import MODEL, flat, packed_batch, settings, start
from helpers.variants import run, some_tokens

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.config import ByteConfig, ConfigError, OptimizerConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, trained
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.state.router import with_twins_of
from stellarbyte_jax.model.trees import partition
from stellarbyte_jax.training import rebalance
from stellarbyte_jax.training.rebalance import make_rebalance, plan, rebalances, tell
from stellarbyte_jax.training.state import TrainState

MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
    "rebalance_interval": 2,
    "split_above": 1.5,
    "merge_below": 0.5,
    "twin_steps": 4,
}
# Of the first layer experts 4 and 1 are idle and 2 is overloaded; the second is in balance.
LOADS = np.asarray([[0.2, 0.03, 0.4, 0.2, 0.01, 0.16], [0.2, 0.15, 0.2, 0.15, 0.15, 0.15]], np.float32)
BUSY, IDLER, IDLEST, SHARE = 2, 1, 4, 0.75


def config_of(**changes):
    return settings(model=dataclasses.replace(MODEL, moe={**MOE, **changes}), ema_decay=0.9)


def at_random(tree, seed):
    """The tree with other numbers in every float array."""
    numbers = np.random.default_rng(seed)

    def other(x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.device_put(numbers.standard_normal(x.shape, np.float32)) if is_float else x

    return jax.tree.map(other, tree)


def state_of(config, loads=LOADS):
    """A state in which everything differs from expert to expert, with these loads."""
    state, step = start(config)
    state, _ = step(state, {name: jax.device_put(x) for name, x in packed_batch().items()})
    tracked = dict(state.frozen["layers"]["0"]["moe"]["router"]["tracked"])
    numbers = np.random.default_rng(5)
    for name in ("priority", "bias", "coldness", "utilization"):
        tracked[name] = jax.device_put(numbers.random(LOADS.shape, np.float32))
    tracked["load"] = jax.device_put(loads)
    frozen = {"layers": {"0": {"moe": {"router": {"tracked": tracked}}}}}
    opt_state, ema = at_random(state.opt_state, 3), at_random(state.ema, 4)
    return state.replace(params=at_random(state.params, 2), opt_state=opt_state, ema=ema, frozen=frozen)


def tracked_of(state):
    return state.frozen["layers"]["0"]["moe"]["router"]["tracked"]


def rebalanced(config, state):
    return jax.jit(make_rebalance(ByteTransformer(config.model)))(state)


def by_path(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_which_experts_of_which_layers():
    config = config_of()
    state = state_of(config)
    moves = plan(config.model, tracked_of(state))
    assert moves.due.tolist() == [True, False]
    assert (int(moves.split[0]), int(moves.merged[0]), int(moves.freed[0])) == (BUSY, IDLER, IDLEST)
    np.testing.assert_allclose(moves.share[0], SHARE, rtol=1e-6)
    np.testing.assert_allclose(moves.loads[0], [6 * 0.03, 6 * 0.01, 6 * 0.4], rtol=1e-6)
    line = "step 8: layer 0: expert 2 split into 2 and 4 (2.40 times its fair load), 4 merged into 1 (0.06 and 0.18)"
    assert tell(config.model, 8, moves) == [line]


@pytest.mark.parametrize(
    ("loads", "due"),
    [
        ([0.3, 0.05, 0.05, 0.2, 0.2, 0.2], True),
        ([0.24, 0.05, 0.05, 0.22, 0.22, 0.22], False),  # none is overloaded
        ([0.4, 0.04, 0.09, 0.16, 0.16, 0.15], False),  # one is idle
        ([0.5, 0.0, 0.0, 0.2, 0.2, 0.1], True),
    ],
)
def test_two_idle_experts_and_an_overloaded_one_are_needed(loads, due):
    config = config_of()
    tracked = tracked_of(state_of(config, np.asarray([loads, loads], np.float32)))
    moves = plan(config.model, tracked)
    assert moves.due.tolist() == [due, due]
    share = loads[moves.merged[0]] / max(loads[moves.merged[0]] + loads[moves.freed[0]], 1e-9)
    np.testing.assert_allclose(moves.share, share or 0.5, rtol=1e-6)  # of two without any load, the mean
    waiting = {**tracked, "twin_steps": tracked["twin_steps"].at[1, 3].set(1.0)}
    assert plan(config.model, waiting).due.tolist() == [due, False]


@pytest.mark.parametrize("optimizer", mostly_slow(["adamw", "lion", "muon"], "lion", "muon"))
def test_weights_moments_and_averages_move_together(optimizer):
    """By hand: of every array of an expert, and of no other, a mean at one place and a copy at another."""
    config = dataclasses.replace(config_of(noise="noisy_topk"), optimizer=OptimizerConfig(name=optimizer))
    before = state_of(config)
    after, _ = rebalanced(config, before)
    moved = 0
    for tree in ("params", "ema", "opt_state"):
        old, new = by_path(getattr(before, tree)), by_path(getattr(after, tree))
        assert old.keys() == new.keys()
        for path, x in old.items():
            expected = x.copy()
            if "['moe']" in path:
                moved += 1
                x = x if "['experts']" in path else np.swapaxes(x, 1, 2)
                expected = x.copy()
                expected[0, IDLER] = np.float32(SHARE) * x[0, IDLER] + np.float32(1 - SHARE) * x[0, IDLEST]
                expected[0, IDLEST] = x[0, BUSY]
                expected = expected if "['experts']" in path else np.swapaxes(expected, 1, 2)
            np.testing.assert_allclose(new[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)
    moments = {"adamw": 2, "lion": 1, "muon": None}[optimizer]
    assert moved == (2 * (2 + 2) + 2 + 4 if moments is None else (2 + moments) * 4)  # Muon's router takes AdamW


def test_what_routers_keep_moves_too():
    config = config_of()
    before = state_of(config)
    old, new = (
        {name: np.asarray(x) for name, x in tracked_of(state).items()}
        for state in (before, rebalanced(config, before)[0])
    )
    for name, x in old.items():
        np.testing.assert_array_equal(new[name][1], x[1], err_msg=name)
    for name in ("priority", "bias", "coldness"):
        expected = old[name][0].copy()
        expected[IDLER] = SHARE * old[name][0, IDLER] + (1 - SHARE) * old[name][0, IDLEST]
        expected[IDLEST] = old[name][0, BUSY]
        np.testing.assert_allclose(new[name][0], expected, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(new["load"][0], [0.2, 0.04, 0.2, 0.2, 0.2, 0.16], rtol=1e-6)
    np.testing.assert_allclose(new["load"].sum(1), 1, rtol=1e-6)
    assert new["utilization"][0, BUSY] == new["utilization"][0, IDLEST] == old["utilization"][0, BUSY] / 2
    assert new["twin"].tolist() == [[0, 1, 4, 3, 2, 5], [0, 1, 2, 3, 4, 5]]
    assert new["twin_steps"].tolist() == [[0, 0, 4, 0, 4, 0], [0] * 6]
    np.testing.assert_array_equal(new["steps"], old["steps"])


def test_each_stack_moves_by_the_loads_of_its_own_layers():
    """Layers 0 and 2 have experts, each in a stack of its own, and those of layer 2 alone are in no balance."""
    moe = {**MOE, "mlp_only_layers": (1,)}
    model = ByteTransformer(dataclasses.replace(MODEL, num_hidden_layers=3, moe=moe))
    params, frozen = partition(at_random(param_shapes(model), 2), trained(model))
    for stack, loads in (("0", LOADS[1:]), ("2", LOADS[:1])):
        tracked = frozen["layers"][stack]["moe"]["router"]["tracked"]
        tracked |= {"load": jax.device_put(loads), "twin_steps": jnp.zeros((1, 6))}
    before = TrainState(jnp.zeros((), jnp.int32), params, (), None, frozen, State())
    after, moves = jax.jit(make_rebalance(model))(before)
    assert moves.due.tolist() == [False, True]
    assert [line.partition(" split")[0] for line in tell(model.config, 8, moves)] == ["step 8: layer 2: expert 2"]
    changed = {path[:14] for path, x in by_path(before.params).items() if np.any(x != by_path(after.params)[path])}
    assert changed == {"['layers']['2'"}
    down = after.params["layers"]["2"]["moe"]["experts"]["down"]
    np.testing.assert_array_equal(down[0, IDLEST], params["layers"]["2"]["moe"]["experts"]["down"][0, BUSY])


def test_in_balance_nothing_changes():
    config = config_of()
    before = state_of(config, np.full((2, 6), 1 / 6, np.float32))
    after, moves = rebalanced(config, before)
    assert not np.any(moves.due) and tell(config.model, 8, moves) == []
    jax.tree.map(np.testing.assert_array_equal, after, before)


PLAIN, RARE = {}, {"scoring_func": "sigmoid", "dynamic_k": 0.5}


@pytest.mark.parametrize("more", mostly_slow([PLAIN, {"noise": "gumbel"}, RARE], PLAIN, RARE))
def test_tokens_that_used_no_idle_expert_get_what_they_got(more):
    config = config_of(**more)
    model = ByteTransformer(config.model)
    state = state_of(config, np.stack([LOADS[0]] * 2))
    state = state.replace(params=jax.tree.map(lambda x: 0.3 * x, state.params))
    tokens = some_tokens(4, 16)
    for used in (False, True):
        tracked = tracked_of(state)
        bias = jnp.zeros((2, 6)).at[:, jnp.asarray([IDLER, IDLEST])].set(0.0 if used else -10.0)
        frozen = {"layers": {"0": {"moe": {"router": {"tracked": {**tracked, "bias": bias}}}}}}
        before = state.replace(frozen=frozen)
        after, moves = rebalanced(config, before)
        assert np.all(moves.due)
        moved = np.abs(run(model, after.weights, tokens) - run(model, before.weights, tokens)).max()
        assert (moved > 1e-4) if used else (moved < 1e-6)


def test_the_halves_learn_apart_while_each_has_its_tokens():
    config = config_of(twin_steps=2)
    state, step = start(config)
    tracked = {**tracked_of(state), "load": jax.device_put(np.stack([LOADS[0]] * 2))}
    state = state.replace(frozen={"layers": {"0": {"moe": {"router": {"tracked": tracked}}}}})
    state, _ = rebalanced(config, state)
    batch = {name: jax.device_put(x) for name, x in packed_batch().items()}
    for left in (1, 0):
        state, metrics = step(state, batch)
        assert metrics["finite"]
        assert tracked_of(state)["twin_steps"][:, BUSY].tolist() == [left] * 2
    down = np.asarray(state.params["layers"]["0"]["moe"]["experts"]["down"])
    assert np.abs(down[:, BUSY] - down[:, IDLEST]).max() > 1e-6


def test_a_rule_that_keeps_another_shape_is_refused_before_the_run():
    config = config_of()
    state = state_of(config)
    kept = jax.tree.map(lambda x: x[..., 0], state.params)
    with pytest.raises(ValueError, match=r"moe.rebalance_interval: the optimizer keeps float32 \[2, 6, 16\] of layers"):
        jax.eval_shape(make_rebalance(ByteTransformer(config.model)), state.replace(opt_state=kept))
    plain = config_of(rebalance_interval=None, split_above=2.0, merge_below=0.25, twin_steps=100)
    assert rebalance.compiled_rebalance(plain, ByteTransformer(plain.model), state, print) is None


def test_after_which_steps():
    config = dataclasses.replace(config_of(), steps=10)
    assert [step for step in range(1, 11) if rebalances(config, step)] == [2, 4, 6]
    for steps, lines in ((6, 0), (5, 1)):
        told = []
        each = dataclasses.replace(config, steps=steps, schedule=type(config.schedule)(warmup_steps=0))
        shapes = jax.eval_shape(lambda: start(config)[0])
        rebalance.compiled_rebalance(each, ByteTransformer(each.model), shapes, told.append)
        assert len(told) == lines and all("twin_steps=4 do not fit into steps=5: no expert is split" in x for x in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rebalance_interval": None}, "moe.split_above, merge_below, twin_steps belongs to moe.rebalance_interval"),
        ({"num_experts_per_tok": 6}, "more than num_experts_per_tok, there are 6 and 6"),
        ({"num_experts": 2, "num_experts_per_tok": 1}, "it needs 3 experts"),
        ({"split_above": 1.0}, "moe.split_above 1.0 is no overload"),
        ({"merge_below": 1.0}, "moe.merge_below 1.0 is the load of a used expert"),
        ({"shared_pool": True}, "moe.rebalance_interval and moe.shared_pool"),
        ({"n_group": 3, "topk_group": 2}, "moe.rebalance_interval and moe.topk_group"),
        ({"adaptive_temperature": True}, "moe.rebalance_interval and moe.adaptive_temperature"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ByteConfig(moe={**MOE, **changes})


RUN = (
    "steps=10",
    "data.validation=none",
    "evaluation.interval=500",
    "evaluation.batches=50",
    "checkpoint.interval=100",
    "model.moe.num_experts=6",
    "model.moe.intermediate_size=8",
    "model.moe.rebalance_interval=3",
    "model.moe.split_above=1.01",
    "model.moe.merge_below=0.99",
    "model.moe.twin_steps=2",
)


def test_a_run_with_splits_resumes_bit_by_bit(tmp_path, capsys):
    """Stopped after the step of a split, and while twins exclude each other."""
    straight, stopped = tmp_path / "a", tmp_path / "b"
    for directory in (straight, stopped):
        directory.mkdir()
    assert cli(write_config(straight), *RUN) == 0
    lines = re.findall(r"step (\d+): layer (\d): expert \d split into \d and \d \(", capsys.readouterr().out)
    assert {"3", "6"} <= {step for step, _ in lines} <= {"3", "6"}
    assert "split into" in (straight / "run" / "train.log").read_text()
    file = write_config(stopped)
    with at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert cli(file, *RUN) == 143
    capsys.readouterr()
    assert cli(file, *RUN) == 0
    assert re.search(r"resumed at step [67] ", capsys.readouterr().out)
    assert log_of(stopped / "run") == log_of(straight / "run")
    weights = [load_weights(directory / "run")[1] for directory in (straight, stopped)]
    assert same_weights(*weights)
    tracked = flat(weights[0])["layers/0/moe/router/tracked/twin_steps"]
    assert np.all(tracked == 0)  # the run ends without twins


@pytest.mark.slow
def test_a_run_may_begin_or_end_to_split_experts_and_change_when(tmp_path, capsys):
    """With the weights of another run, whose routers keep no twins, or have some."""
    plain = [setting for setting in RUN if not re.search("rebalance|split|merge|twin", setting)]
    (tmp_path / "a").mkdir()
    file = write_config(tmp_path / "a", CONSTANT)
    assert cli(file, *plain, "steps=3", f"output_dir={tmp_path / 'plain'}") == 0
    begun = (f"init_from={tmp_path / 'plain'}", f"output_dir={tmp_path / 'splits'}", "steps=6")
    assert cli(file, *RUN, *begun) == 0
    assert "step 3: layer 0: expert" in capsys.readouterr().out
    assert cli(file, *RUN, *begun, "steps=7", "model.moe.split_above=3") == 0  # the same run goes on
    assert "setting changed: model.moe.split_above 1.01 -> 3" in capsys.readouterr().out
    ended = (f"init_from={tmp_path / 'splits'}", f"output_dir={tmp_path / 'plain again'}", "steps=3")
    defaults = ("rebalance_interval=none", "split_above=2", "merge_below=0.25", "twin_steps=100")
    assert cli(file, *plain, *ended, *(f"model.moe.{setting}" for setting in defaults)) == 0
    tracked = load_weights(tmp_path / "plain again")[1]["layers"]["0"]["moe"]["router"]["tracked"]
    assert "twin" not in tracked and "load" in tracked
    capsys.readouterr()
    assert cli(file, *plain, "model.moe.rebalance_interval=500", f"output_dir={tmp_path / 'few'}", "steps=3") == 0
    assert "rebalance_interval=500 and twin_steps=100 do not fit into steps=3" in capsys.readouterr().out


def test_twins_stay_twins_where_a_run_goes_on_to_split():
    config = config_of()
    frozen = rebalanced(config, state_of(config))[0].frozen
    jax.tree.map(np.testing.assert_array_equal, with_twins_of(config.model, frozen), frozen)


def test_weights_with_twins_do_not_become_those_of_a_model_without():
    state = rebalanced(config_of(), state_of(config_of()))[0]
    plain = dataclasses.replace(MODEL, moe={"num_experts": 6, "intermediate_size": 16})
    with pytest.raises(ValueError, match="still exclude each other in these weights: set model"):
        with_twins_of(plain, state.frozen)

"""The two halves of a split expert: which tokens see which, for how long, and that no output changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE, make_model, run, some_tokens, with_twins

from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.moe import overflow_candidates
from stellarbyte_jax.model.router import Decision
from stellarbyte_jax.model.state.router import Tally, advance, hidden_twins
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.ops.balance import Routed
from stellarbyte_jax.ops.routing import Choices, choose_experts

SETTINGS = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24, "rebalance_interval": 10}


def test_of_two_twins_even_positions_see_the_lower_number_and_odd_ones_the_other():
    twin, steps = jnp.asarray([0.0, 4, 5, 3, 1, 2]), jnp.asarray([0.0, 2, 0, 0, 2, 0])
    hidden = hidden_twins(twin, steps, jax.device_put(np.asarray([0, 1, 2, 7], np.int32)))
    expected = np.zeros((4, 6), bool)
    expected[[0, 2], 4] = True
    expected[[1, 3], 1] = True  # 2 and 5 exclude each other no longer
    np.testing.assert_array_equal(hidden, expected)


def test_a_hidden_expert_is_not_chosen_whatever_its_bias():
    scores = jnp.asarray([[0.5, 0.2, 0.3, 0.0], [0.0, 0.2, 0.3, 0.5]])
    hidden = jnp.asarray([[False, False, False, True], [True, False, False, False]])
    found = choose_experts(scores, 3, bias_E=jnp.asarray([9.0, 0, 0, 9]), hidden_NE=hidden, normalize=True)
    assert found.experts_NK.tolist() == [[0, 2, 1], [3, 2, 1]]


def test_the_exclusion_counts_down_and_ends():
    model, params = make_model(dataclasses.replace(BASE, num_hidden_layers=1, moe=SETTINGS))
    params = with_twins(params, [(1, 4)], steps=2.0)
    seen = []
    for _ in range(3):
        params = advance(model.config, params, Tally.zero(model.config))
        tracked = tracked_of(params)
        twin, steps = (np.asarray(tracked[name])[0] for name in ("twin", "twin_steps"))
        seen.append((np.round(twin).tolist(), steps[[1, 4]].tolist()))
    own = [0.0, 1, 2, 3, 4, 5]
    assert seen == [([0, 4, 2, 3, 1, 5], [1, 1]), (own, [0, 0]), (own, [0, 0])]


def tracked_of(params: Params) -> Params:
    return params["layers"]["0"]["moe"]["router"]["tracked"]


def split(params: Params, source: int, free: int) -> Params:
    """Weights in which ``free`` is a copy of ``source`` everywhere; unlike the product, by the names of leaves."""

    def copied(path, x):
        names = [key.key for key in path]
        x = np.array(x)
        if "experts" in names or names[-1] in ("bias", "priority", "coldness"):
            x[:, free] = x[:, source]
        elif names[-1] == "kernel" and "router" in names:
            x[..., free] = x[..., source]
        return jax.device_put(x)

    return with_twins(jax.tree_util.tree_map_with_path(copied, params), [(source, free)])


MORE = {
    "softmax": {},
    "not normalised": {"norm_topk_prob": False},
    "as many as needed": {"dynamic_k": 0.6, "num_experts_per_tok": 4},
    "sigmoid, priority": {"scoring_func": "sigmoid", "expert_priority": True, "cooling_steps": 4},
    "a gate that reads contexts": {"gate": "context", "context_size": 6, "history_decay": 0.5},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE.keys())
def test_a_split_into_a_place_that_nobody_saw_changes_no_output(more):
    """The model before has one expert less: of the two, here and there, each token sees one."""
    moe = {**SETTINGS, **more}
    model, params = make_model(dataclasses.replace(BASE, num_hidden_layers=2, moe=moe))
    fewer = without(params, 4)
    smaller = dataclasses.replace(model.config.moe, num_experts=5, rebalance_interval=None)
    before = run(type(model)(dataclasses.replace(model.config, moe=smaller)), fewer, some_tokens(3, 16))
    after = every_layer(split(params, 1, 4))
    np.testing.assert_allclose(run(model, after, some_tokens(3, 16)), before, atol=1e-6)
    other = with_twins(after, [(1, 4)], steps=0.0)
    assert np.abs(run(model, every_layer(other), some_tokens(3, 16)) - before).max() > 1e-4  # twins that compete


def every_layer(params: Params) -> Params:
    """The twins of the first layer in all of them."""
    tracked = tracked_of(params)
    both = {name: jnp.broadcast_to(tracked[name][:1], tracked[name].shape) for name in ("twin", "twin_steps")}
    tracked.update(both)
    return params


def without(params: Params, expert: int) -> Params:
    """Weights without this expert."""
    kept = np.asarray([e for e in range(6) if e != expert])

    def cut(path, x):
        names, x = [key.key for key in path], np.asarray(x)
        if "experts" in names:
            return x[:, kept]
        routed = ("tracked" in names and names[-1] != "steps") or (names[-1] == "kernel" and "router" in names)
        return x[..., kept] if routed else x

    found = jax.tree_util.tree_map_with_path(cut, params)
    for name in ("twin", "twin_steps"):
        del tracked_of(found)[name]
    return found


def test_positions_are_those_of_documents():
    """In a packed row, and in a row that begins in the middle of a text."""
    model, params = make_model(dataclasses.replace(BASE, moe=SETTINGS))
    params = with_twins(params, [(1, 4), (0, 2)])
    tokens = some_tokens(1, 8)
    plain = run(model, params, tokens)
    again = run(model, params, tokens, positions_BT=jnp.arange(2, 10, dtype=jnp.int32)[None])
    shifted = run(model, params, tokens, positions_BT=jnp.arange(1, 9, dtype=jnp.int32)[None])
    np.testing.assert_allclose(again, plain, atol=1e-5)  # rotations know distances alone
    assert np.abs(shifted - plain).max() > 1e-4


def test_what_had_no_room_is_not_offered_to_an_expert_that_the_token_does_not_see():
    moe = {"num_experts": 4, "num_experts_per_tok": 1, "dispatch": "capacity", "overflow": ("next_best", "cold")}
    config = dataclasses.replace(BASE, moe=moe)
    scores = jnp.asarray([[0.6, 0.4, 0.0, 0.0], [0.0, 0.2, 0.3, 0.5]])
    choices = Choices(jax.device_put(np.asarray([[0], [3]], np.int32)), jnp.ones((2, 1)), jnp.ones(2))
    routed = Routed(scores, scores, choices.experts_NK, jnp.ones(2, bool), 1)
    decision = Decision(choices, routed, jnp.ones(()), jnp.asarray([0.1, 0.9, 0.9, 0.2]), None)
    found = overflow_candidates(config, decision, context(), None)
    assert found is not None and found.tolist() == [[1, 4, 0, 4], [2, 1, 4, 3]]


def context():
    """Two tokens of one row."""
    positions = jnp.arange(2, dtype=jnp.int32)[None]
    return LayerContext(positions, positions, None, None)  # type: ignore[arg-type]

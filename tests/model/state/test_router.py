"""What routers keep from step to step, beside numpy, layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE

from stellarbyte_jax.model.state.router import RouterState, Tally, advance

E = 5
compiled = jax.jit(advance, static_argnums=0)


def network(**moe):
    """Layers 1, 3 and 4 of five have experts, in two stacks."""
    moe = {"num_experts": E, "mlp_only_layers": (0, 2), **moe}
    return dataclasses.replace(BASE, num_hidden_layers=5, moe=moe)


def drawn(config, seed=0):
    """A tree of weights with what routers keep, and a tally whose layers differ."""
    random = np.random.default_rng(seed)
    L = len(config.moe_layers)
    wanted = random.integers(0, 40, (L, E)).astype(np.float64)
    wanted[0, 1], wanted[1] = 0, 8  # one without any, and a layer where all is even
    counts = np.floor(wanted * random.random((L, E)))
    wanted[0, 3], counts[0] = 40, [0, 0, 0, 10, 0]  # as uneven as can be, and most choices are lost
    counts[2, 0] = wanted[2, 0] + 5  # what others had no room for
    tally = {
        "counts": counts,
        "wanted": wanted,
        "tokens": wanted.sum(1) / 2,
        "lost": (wanted - counts).sum(1),
        "room": np.where(counts == 10, 10.0, random.integers(20, 60, (L, E))),
        "temperature": np.ones(L),
        "moved": np.zeros(L),
    }
    kept = {name: random.random((L, E)) for name in ("load", "utilization", "priority", "bias", "coldness")}
    kept["steps"] = np.full(L, 7.0)
    weights = {"layers": {}, "embed": {"embedding": np.zeros((2, 2), np.float32)}}
    for number, layer in enumerate(config.moe_layers):
        stack, row = config.layer_places[layer]
        for name, x in kept.items():
            at = weights["layers"].setdefault(
                str(stack), {"moe": {"router": {"tracked": {}}}, "attn": {"q": np.ones(1)}}
            )
            stacked = at["moe"]["router"]["tracked"]
            assert row == len(stacked.get(name, ()))
            stacked[name] = np.concatenate([stacked.get(name, x[:0]), x[number : number + 1]]).astype(np.float32)
    return weights, Tally(**{name: jax.device_put(np.asarray(x, np.float32)) for name, x in tally.items()}), kept, tally


def by_hand(config, before, counts, wanted, room):
    """Of one layer, expert by expert."""
    c, after = config.moe, {name: before[name].copy() for name in before if name != "steps"}
    shares = [n / max(counts.sum(), 1) for n in counts]
    for e in range(E):
        used = min(counts[e] / room[e], 1)
        taken = min(counts[e] / wanted[e], 1) if wanted[e] else 0
        wish = 0.5 * taken + 0.3 * (1 - used) + 0.2 * (1 - np.std(shares) * E)
        for name, new in (("load", shares[e]), ("utilization", used), ("priority", max(wish, 0.1))):
            after[name][e] = c.state_decay * before[name][e] + (1 - c.state_decay) * new
        mean = wanted.sum() / E
        after["bias"][e] += c.bias_update_rate * (-1 if wanted[e] > mean else 1 if wanted[e] < mean else 0)
        if c.cooling_steps:
            idle = shares[e] < 0.1 / E
            after["coldness"][e] = 1 if idle else max(before["coldness"][e] - 1 / c.cooling_steps, 0)
    return {**after, "steps": before["steps"] + 1}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings", [{}, {"bias_update_rate": 0.01, "cooling_steps": 4, "state_decay": 0.6}], ids=["default", "all"]
)
def test_what_routers_keep_after_a_step(settings, seed):
    config = network(**settings)
    weights, tally, kept, counted = drawn(config, seed)
    found = compiled(config, weights, tally)
    assert found["embed"].keys() == weights["embed"].keys() and found["layers"].keys() == weights["layers"].keys()
    for number, layer in enumerate(config.moe_layers):
        stack, row = config.layer_places[layer]
        assert "attn" in found["layers"][str(stack)]
        before = {name: x[number] for name, x in kept.items()}
        expected = by_hand(config, before, *(counted[name][number] for name in ("counts", "wanted", "room")))
        after = found["layers"][str(stack)]["moe"]["router"]["tracked"]
        assert after.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(after[name][row], x, atol=1e-6, err_msg=name)


def test_an_expert_without_tokens_gets_cold_and_cools_down_from_the_step_of_its_next_ones():
    config = network(cooling_steps=4)
    weights, tally, _, _ = drawn(config)
    weights["layers"]["1"]["moe"]["router"]["tracked"]["coldness"][:] = 0
    seen = []
    for idle in (True, True, False, False, True, False, False, False, False, False):
        counts = jnp.full((3, E), 10.0).at[0, 2].set(0.0 if idle else 10.0)
        weights = compiled(config, weights, dataclasses.replace(tally, counts=counts, wanted=counts))
        coldness = np.asarray(weights["layers"]["1"]["moe"]["router"]["tracked"]["coldness"])[0]
        assert not coldness[[0, 1, 3, 4]].any()
        seen.append(float(coldness[2]))
    assert seen == [1, 1, 0.75, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]


def test_a_bias_stays_where_an_expert_has_its_fair_share_exactly():
    """28 of 112 are a quarter, also where a division is rounded."""
    config = dataclasses.replace(BASE, moe={"num_experts": 3, "bias_update_rate": 1.0})
    zeros = jnp.zeros((4, 3))
    kept = {name: zeros for name in ("load", "utilization", "priority", "bias", "coldness")}
    weights = {"layers": {"0": {"moe": {"router": {"tracked": {**kept, "steps": jnp.zeros(4)}}}}}}
    for fair in range(1, 60):
        wanted = jax.device_put(np.asarray([[fair, fair - 1, fair + 1]] * 4, np.float32))
        tally = dataclasses.replace(Tally.zero(config), wanted=wanted, counts=wanted)
        found = compiled(config, weights, tally)["layers"]["0"]["moe"]["router"]["tracked"]["bias"]
        assert np.asarray(found).tolist() == [[0, 1, -1]] * 4
    nothing = compiled(config, weights, Tally.zero(config))["layers"]["0"]["moe"]["router"]["tracked"]
    assert not np.any(nothing["bias"]), "a step without tokens says nothing"


def test_a_state_of_routers_has_what_gates_read():
    assert RouterState.initial(network(), 3) is None
    config = network(gate="context", history_decay=0.5)
    state = RouterState.initial(config, 3)
    assert state.history_LBD.shape == (3, 3, BASE.hidden_size) and state.tally is None
    state = RouterState(jnp.arange(12.0).reshape(2, 3, 2))
    assert state.select([2, 0, 2]).history_LBD[0].tolist() == [[4, 5], [0, 1], [4, 5]]

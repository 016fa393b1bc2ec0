"""How long exchanges take on several machines: groups, adapters and latencies, by hand."""

import dataclasses

import pytest

from stellarbyte_jax.config import load
from stellarbyte_jax.training.plan import Planner
from stellarbyte_jax.training.plan_devices import KINDS
from stellarbyte_jax.training.plan_exchange import Exchange
from stellarbyte_jax.training.plan_network import Links, calls, cost, group, ways

KIND_OF = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def sizes(**axes):
    return {name: axes.get(name, 1) for name in ("data", "fsdp", "expert", "context", "tensor")}


def plan_on(*settings, **axes):
    config = load("quickstart", ["global_batch_size=64", "model.hidden_size=64", *settings])
    return Planner(config, KINDS["H200"]).plan(sizes(**axes))


def links(bus, network, latency=0.0):
    return Links(dict.fromkeys(KIND_OF, bus), network, latency)


@pytest.mark.parametrize(
    ("axis", "axes", "expected"),
    [
        ("fsdp", {"fsdp": 8}, (8, 8)),
        ("data", {"data": 8, "fsdp": 8}, (8, 1)),
        ("fsdp", {"fsdp": 64}, (64, 8)),
        ("fsdp", {"fsdp": 64, "tensor": 4}, (64, 2)),
        ("data+fsdp", {"data": 4, "fsdp": 8}, (32, 8)),
        ("data+tensor", {"data": 16, "fsdp": 2, "tensor": 2}, (32, 4)),
    ],
)
def test_a_group_has_the_devices_of_its_axes_and_a_machine_has_eight_neighbours(axis, axes, expected):
    assert group(axis, sizes(**axes)) == expected


def latencies(kind, n, g):
    return pytest.approx(sorted(1e6 * seconds for seconds, _ in ways(kind, n, g)))


def test_a_ring_takes_a_step_for_each_device_and_a_tree_one_for_each_doubling_of_machines():
    assert latencies("all-gather", 8, 8) == [14 + 7 * 1.9, 8.4 + 7 * 3.4]
    assert latencies("reduce-scatter", 64, 8) == [14 + 56 * 1.9 + 7 * 4, 8.4 + 56 * 3.4 + 7 * 14]
    tree = [14 + 2 * 9 * 8.5, 8.4 + 2 * 9 * 14]
    assert latencies("all-reduce", 512, 1) == [*tree, 14 + 2 * 511 * 8.5, 8.4 + 2 * 511 * 14]
    pat = 8 + 4 * 14 / 3.5 + 2.8 * 16
    assert latencies("all-gather", 16, 1) == [pat, 14 + 15 * 8.5, 8.4 + 15 * 14]


def test_a_group_uses_the_adapters_of_all_its_devices_of_a_machine():
    sent = 4 * 10**9
    gathered, summed = (
        Exchange(kind, axis, "gradients", sent) for kind, axis in (("all-gather", "fsdp"), ("all-reduce", "data"))
    )
    over_all, within = plan_on(fsdp=64), plan_on(data=8, fsdp=8)
    found = cost(gathered, over_all, links(1e12, 50e9))
    assert (found.link, found.seconds) == ("network", pytest.approx(sent / 8 / 50e9))
    assert cost(summed, within, links(1e12, 50e9)).seconds == pytest.approx(sent / 50e9)
    found = cost(gathered, within, links(100e9, 50e9))
    assert (found.link, found.seconds) == ("NVLink", pytest.approx(sent / 100e9))
    found = cost(gathered, over_all, links(20e9, 50e9))
    assert (found.link, found.seconds) == ("NVLink", pytest.approx(sent / 20e9)), "the slower of the two"
    tokens = dataclasses.replace(gathered, kind="all-to-all", what="tokens")
    assert cost(tokens, over_all, links(1e12, 50e9)).seconds == pytest.approx(sent * 56 / 63 / 50e9)


def test_latency_counts_once_a_call_and_the_fastest_way_is_taken():
    plan = plan_on(fsdp=8)
    layers = plan.config.model.num_hidden_layers
    small = Exchange("all-gather", "fsdp", "weights", 1)
    assert calls(small, plan) == 2 * (layers + 2)
    found = cost(small, plan, links(1e12, 50e9, latency=1.0))
    assert found.latency == pytest.approx(2 * (layers + 2) * 1e-6 * (14 + 7 * 1.9)), "LL128 has less latency"
    large = dataclasses.replace(small, sent=10**12)
    found = cost(large, plan, links(1e12, 50e9, latency=1.0))
    assert found.latency == pytest.approx(2 * (layers + 2) * 1e-6 * (8.4 + 7 * 3.4)), "Simple has more bandwidth"
    in_parts = plan_on("gradient_accumulation_steps=2", fsdp=8)
    assert calls(small, in_parts) == 2 * calls(small, plan)


@pytest.mark.parametrize(
    ("kind", "what", "settings", "of_layer", "once"),
    [
        ("all-gather", "activations", [], 4, 2),
        ("all-gather", "activations", ["model.remat=dots"], 6, 2),
        ("reduce-scatter", "activations", [], 6, 2),
        ("reduce-scatter", "activations", ["model.remat=full"], 7, 2),
        ("reduce-scatter", "activations", ["model.parallel_residual=true", "model.remat=full"], 5, 2),
        ("collective-permute", "keys and values", [], 2 * 3 * 2, 0),
        ("collective-permute", "keys and values", ["model.remat=dots"], 2 * 3 * 3, 0),
        ("all-reduce", "gradients", [], 1, 2),
    ],
)
def test_calls_of_a_layer_and_those_besides(kind, what, settings, of_layer, once):
    """By hand: of a branch its input, its result and their gradients; keys and values go to three other devices."""
    plan = plan_on(*settings, context=4, tensor=2)
    layers = plan.config.model.num_hidden_layers
    assert calls(Exchange(kind, "tensor", what, 1), plan) == layers * of_layer + once


def test_tokens_go_to_experts_and_back_once_more_where_layers_are_computed_again():
    for remat, slots, gathered in (("none", 4, 2), ("full", 6, 3)):
        plan = plan_on("model.num_hidden_layers=2", "model.moe.num_experts=4", f"model.remat={remat}", expert=4)
        layers = plan.config.model.num_hidden_layers
        found = [
            calls(Exchange(kind, "expert", "tokens", 1), plan)
            for kind in ("all-to-all", "all-gather", "reduce-scatter")
        ]
        assert found == [layers * slots, layers * gathered, layers * 2]


def test_a_message_to_another_machine_takes_longer():
    for kind in ("all-to-all", "collective-permute"):
        assert latencies(kind, 8, 8) == [8.4 + 3.4, 14 + 1.9]
        assert latencies(kind, 16, 8) == [14 + 4, 8.4 + 14]

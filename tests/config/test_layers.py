"""What one layer is, and which layers are stacked: by their weights alone, whatever their windows."""

import dataclasses

import pytest
from helpers.variants import BASE

from stellarbyte_jax.config import LayerGroup, LayerSpec

SLIDING, FULL = "sliding_attention", "full_attention"


def specs(*windows):
    return tuple(LayerSpec(window) for window in windows)


@pytest.mark.parametrize(
    ("windows", "period"),
    [
        ((3, 3, None) * 2, (3, 3, None)),
        ((3,) * 6, (3,)),
        ((None,), (None,)),
        ((3, None, 3), (3, None, 3)),  # none comes twice
        ((3, 3, 3, None) * 2 + (3, 3), (3, 3, 3, None)),
        ((3, None, 3, None, 3, 3), (3, None, 3, None, 3, 3)),
        ((3, 3, None, None, 3, None), (3, 3, None, None, 3, None)),
    ],
)
def test_the_period_is_the_shortest_that_repeats_to_the_end_of_the_group(windows, period):
    group = LayerGroup(specs(*windows))
    assert group.period == specs(*period)
    assert group.repeats == len(windows) // len(period)
    assert group.period * group.repeats + group.tail == group.specs


def test_the_last_period_may_be_cut_short():
    """26 layers with a global one after every five."""
    group = LayerGroup(specs(*((9,) * 5 + (None,)) * 4, 9, 9))
    assert (group.period, group.repeats) == (specs(9, 9, 9, 9, 9, None), 4)
    assert (group.tail, group.layers_of_places) == (specs(9, 9), (5, 5, 4, 4, 4, 4))


def test_all_layers_of_a_network_are_one_group():
    for settings in ({}, {"sliding_window": 3, "layer_types": (SLIDING, SLIDING, FULL, SLIDING)}):
        config = dataclasses.replace(BASE, **settings)
        assert config.layer_groups == (LayerGroup(config.layer_specs),)
    config = dataclasses.replace(BASE, memory={"length": (8, 0, 4, 8), "recent_share": 0.5})
    assert config.layer_groups == (LayerGroup(config.layer_specs),)


def test_windows_and_memory_of_each_layer():
    config = dataclasses.replace(BASE, sliding_window=5, layer_types=(SLIDING, FULL, FULL, SLIDING))
    assert config.layer_specs == specs(5, None, None, 5)
    assert config.windows == (5, None, None, 5)
    assert dataclasses.replace(BASE, sliding_window=5).layer_specs == specs(5, 5, 5, 5)
    config = dataclasses.replace(BASE, memory={"length": (8, 0, 4, 1), "recent_share": 0.75})
    assert config.layer_specs == (LayerSpec(7, 6, 2), LayerSpec(None), LayerSpec(4, 3, 1), LayerSpec(2, 1, 0))
    assert [spec.memory_slots for spec in config.layer_specs] == [8, 0, 4, 1]
    assert (config.memory_slots, BASE.memory_slots) == (8, 0)

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
        ((3, None, 3), (3, None, 3)),  # two do not divide three
        ((3, None, 3, None, 3, 3), (3, None, 3, None, 3, 3)),
        ((3, 3, None, None, 3, None), (3, 3, None, None, 3, None)),
    ],
)
def test_the_period_is_the_shortest_that_repeats_through_the_group(windows, period):
    group = LayerGroup(specs(*windows))
    assert group.period == specs(*period)
    assert group.repeats == len(windows) // len(period)
    assert group.period * group.repeats == group.specs


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

"""Which layers have windows: as ``config.json`` says it, against transformers' own reading, and what is refused."""

import tracemalloc
from typing import Any

import pytest
from helpers.hf_models import NEEDS_TORCH, SMALL, small_config

from stellarbyte_jax.hf.families import MISTRAL, QWEN2, STELLARBYTE
from stellarbyte_jax.hf.settings import parse_config, settings_json

QWEN_FILE = SMALL | {"model_type": "qwen2"}
OWN_FILE = SMALL | {"model_type": "stellarbyte"}
FULL, NEAR = "full_attention", "sliding_attention"


def windows(values: dict[str, Any]) -> tuple[int | None, ...]:
    return parse_config(values, "here")[1].windows


@pytest.mark.parametrize("first", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("used", [True, False])
def test_windows_from_a_layer_on_are_those_of_transformers(first: int, used: bool) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import Qwen2Config

    values = SMALL | {"use_sliding_window": used, "sliding_window": 8, "max_window_layers": first}
    expected = tuple(8 if name == NEAR else None for name in Qwen2Config(**values).layer_types)
    assert windows(QWEN_FILE | values) == expected


@pytest.mark.parametrize("types", [(FULL, NEAR, NEAR), (NEAR,) * 3, (FULL,) * 3], ids=str)
def test_versions_without_names_of_layers_read_the_same_windows(types: tuple[str, ...]) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import Qwen2Config

    config = small_config(attention_bias=True, sliding_window=8 if NEAR in types else None, layer_types=types)
    written = settings_json(QWEN2, config)
    assert written.pop("layer_types") == list(types)
    assert Qwen2Config(**written).layer_types == list(types)
    assert written["use_sliding_window"] == (NEAR in types)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"layer_types": [FULL, NEAR, FULL], "sliding_window": 8},
            "layer_types asks for sliding_attention, and use_sliding_window is false: change one$",
        ),
        (
            {"layer_types": [FULL, "chunked_attention", FULL]},
            "layer_types names 'chunked_attention': full_attention and sliding_attention are known$",
        ),
        ({"layer_types": FULL}, "layer_types must be a list of names, got 'full_attention'$"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "1"},
            "max_window_layers must be a number of layers, got '1'$",
        ),
        ({"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": "3"}, "max_window_layers must be a "),
        ({"use_sliding_window": True, "num_hidden_layers": -1}, "ByteConfig.num_hidden_layers must be int"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_contradicts_itself_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {message}"):
        windows(QWEN_FILE | values)


def test_a_number_of_layers_that_is_a_mistake_takes_no_memory() -> None:
    values = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "num_hidden_layers": 400_000}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^here: .*num_hidden_layers"):
            windows(QWEN_FILE | values)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"attention_windows": [4, 5, None]},
            r"attention_windows has windows of \[4, 5\] tokens: one size is implemented$",
        ),
        ({"attention_windows": [True, None, None]}, "attention_windows must be a list of numbers and nulls, got "),
        ({"attention_windows": [4.0, None, None]}, "attention_windows must be a list of numbers and nulls, got "),
        ({"attention_windows": "4"}, "attention_windows must be a list of numbers and nulls, got '4'$"),
        (
            {"attention_windows": [4, None, None], "layer_types": [FULL, NEAR, FULL]},
            "layer_types and attention_windows contradict each other: change attention_windows alone$",
        ),
        (
            {"attention_windows": [4, None, None], "sliding_window": 5},
            "sliding_window and attention_windows contradict each other: change attention_windows alone$",
        ),
        (  # with sinks caches may drop nothing, so that they are told of no window
            {"attention_windows": [4, 4, 4], "sink_tokens": 2, "sliding_window": 4},
            "sliding_window and attention_windows contradict each other: change attention_windows alone$",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_windows_of_our_own_family_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {message}"):
        windows(OWN_FILE | values)


def test_windows_of_our_own_family_need_nothing_else() -> None:
    for values in ({}, {"layer_types": None}, {"sliding_window": None}):
        assert windows(OWN_FILE | values | {"attention_windows": [4, None, 4]}) == (4, None, 4)
        assert windows(OWN_FILE | values | {"attention_windows": None}) == (None, None, None)
    told = {"layer_types": [NEAR, FULL, NEAR], "sliding_window": 4}
    assert windows(OWN_FILE | {"attention_windows": [4, None, 4]} | told) == (4, None, 4)
    sinks = {"attention_windows": [4, 4, 4], "sink_tokens": 2}
    assert windows(OWN_FILE | sinks | {"layer_types": [FULL] * 3}) == (4, 4, 4)


def test_windows_are_written_where_the_family_has_them() -> None:
    mixed = small_config(sliding_window=8, layer_types=(FULL, NEAR, FULL))
    assert settings_json(STELLARBYTE, mixed)["attention_windows"] == [None, 8, None]
    assert settings_json(MISTRAL, small_config(sliding_window=8))["sliding_window"] == 8

"""Rotary settings of both generations of ``config.json``, against the frequencies that transformers makes of them."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, small_config

from stellarbyte_jax.config import RopeScaling
from stellarbyte_jax.hf.rope import parse_rope, rope_json
from stellarbyte_jax.hf.settings import parse_config
from stellarbyte_jax.model.positions import position_scheme
from stellarbyte_jax.ops.rotary.scaling import scaled_frequencies

YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}


def parse(**values: Any) -> tuple[float, RopeScaling]:
    return parse_rope(values, 512, "here/config.json")


@pytest.mark.parametrize(
    ("values", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 5.0}, 5.0),
        ({"rope_scaling": None}, 10000.0),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5.0}}, 5.0),
        ({"rope_theta": 5.0, "rope_scaling": None}, 5.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, 5.0),
        ({"rope_parameters": {"rope_theta": 5.0}}, 5.0),
        ({"rope_theta": 5.0, "rope_scaling": {"rope_type": "default"}}, 5.0),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}}, 5.0),
        ({"rope_theta": 5, "rope_parameters": {"rope_theta": 5.0}}, 5.0),
    ],
    ids=str,
)
def test_theta_of_both_generations(values: dict[str, Any], theta: float) -> None:
    assert parse(**values)[0] == theta


def test_scalings_of_both_generations() -> None:
    def scaling(**values: Any) -> RopeScaling:
        return parse(**values)[1]

    linear = RopeScaling(name="linear", factor=2.0)
    assert scaling() == scaling(rope_scaling={}) == scaling(rope_scaling={"type": "default"}) == RopeScaling()
    assert scaling(rope_scaling={"type": "linear", "factor": 2}) == linear
    assert scaling(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0}) == linear
    assert scaling(rope_scaling={"type": None, "rope_type": "linear", "factor": 2.0}) == linear
    assert scaling(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}) == linear
    both = {"rope_type": "linear", "factor": 2.0}
    assert scaling(rope_theta=5.0, rope_scaling=both, rope_parameters=both | {"rope_theta": 5.0}) == linear
    assert scaling(rope_scaling={}, rope_parameters=both) == linear
    assert scaling(rope_parameters=both | {"partial_rotary_factor": 1.0}, partial_rotary_factor=1) == linear
    assert scaling(rope_scaling={"type": "dynamic", "factor": 2.0}) == RopeScaling(name="dynamic", factor=2.0)


@pytest.mark.parametrize("kind", [{"rope_type": "linear"}, YARN, LLAMA3], ids=lambda kind: kind["rope_type"])
def test_a_factor_of_one_is_no_scaling(kind: dict[str, Any]) -> None:
    assert parse(rope_scaling={**kind, "factor": 1.0})[1] == RopeScaling()
    assert parse(rope_scaling={**YARN, "factor": 1.0, "attention_factor": 1.5})[1].attention_factor == 1.5


def test_a_length_outside_that_is_null_is_none() -> None:
    inside = LLAMA3 | {"original_max_position_embeddings": 32}
    assert parse(rope_scaling=inside, original_max_position_embeddings=None) == parse(rope_scaling=inside)


def test_dynamic_scaling_by_one_grows_all_the_same() -> None:
    assert parse(rope_scaling={"type": "dynamic", "factor": 1.0})[1] == RopeScaling(name="dynamic", factor=1.0)


def test_without_an_original_length_the_models_own_is_meant() -> None:
    expected = RopeScaling(name="yarn", factor=2.0, original_max_position_embeddings=512)
    assert parse(rope_scaling=YARN | {"truncate": True, "mscale": None})[1] == expected
    stated = YARN | {"original_max_position_embeddings": 64, "attention_factor": 0.5}
    assert parse(rope_scaling=stated)[1] == (
        dataclasses.replace(expected, original_max_position_embeddings=64, attention_factor=0.5)
    )
    assert parse(rope_scaling=LLAMA3)[1] == dataclasses.replace(
        expected, name="llama3", low_freq_factor=2.0, high_freq_factor=3.0
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_scaling": {"type": "longrope"}},
            r": rope_scaling\.rope_type is 'longrope'; implemented are default, linear, dynamic, yarn, llama3$",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r": rope_scaling\.rope_type is \['yarn'\]; implemented are"),
        ({"rope_scaling": "linear"}, r": rope_scaling must be an object, got 'linear'$"),
        ({"rope_scaling": {"type": "linear"}}, r": rope_scaling lacks factor, which rope_type 'linear' needs$"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            r": rope_parameters lacks low_freq_factor, high_freq_factor, which rope_type 'llama3' needs$",
        ),
        (
            {"rope_scaling": {"factor": 2.0}},
            r": rope_scaling holds factor: not implemented for rope_type 'default'$",
        ),
        (
            {"rope_parameters": LLAMA3 | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            r": rope_parameters holds mscale, mscale_all_dim: not implemented for rope_type 'llama3'$",
        ),
        (
            {"rope_parameters": YARN | {"mscale": "1"}},
            r": rope_parameters\.mscale must be float \(not negative, finite\), got '1'$",
        ),
        (
            {"rope_parameters": YARN | {"factor": None, "original_max_position_embeddings": "8"}},
            r": rope_parameters\.factor is null, and the lengths it follows from are no numbers: give a factor$",
        ),
        (
            {"rope_parameters": {"full_attention": {}}},
            r": rope_parameters holds full_attention: not implemented for rope_type 'default'$",
        ),
        (
            {"rope_parameters": YARN | {"truncate": False}},
            r": rope_parameters\.truncate is False; only true, the default, is implemented$",
        ),
        (
            {"rope_parameters": YARN | {"truncate": None}},  # transformers takes it for false
            r": rope_parameters\.truncate is None; only true, the default, is implemented$",
        ),
        ({"rope_theta": [1]}, r": rope_theta must be float \(positive, finite\), got \[1\]$"),
        ({"rope_theta": 10**400}, r": rope_theta must be float \(positive, finite\), got 1000"),
        (
            {"rope_parameters": YARN | {"truncate": 1}},
            r": rope_parameters\.truncate is 1; only true, the default, is implemented$",
        ),
        (
            {"rope_parameters": YARN | {"factor": "2", "mscale": 0.7, "mscale_all_dim": 1.5}},
            r": rope_parameters\.factor must be float \(not negative, finite\), got '2'$",
        ),
        (
            {"rope_parameters": YARN | {"factor": 0, "mscale": 0.7, "mscale_all_dim": 1.5}},
            r": rope_parameters: .*factor must be ",
        ),
        (
            {"rope_parameters": LLAMA3 | {"truncate": True}},
            r": rope_parameters holds truncate: not implemented for rope_type 'llama3'$",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
            r": rope_scaling says rope_type 'yarn' and type 'linear': keep one of them$",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r": rope_parameters and rope_scaling contradict each other: keep one of them$",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            r": rope_parameters: .*factor must be at least 1, got 0\.5$",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r": rope_parameters\.partial_rotary_factor is 0\.5; only whole heads are rotated here, a factor of 1$",
        ),
        ({"partial_rotary_factor": 0.25}, r": partial_rotary_factor is 0\.25; only whole heads are rotated"),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
            r": contradicting values \{'rope_theta': 5\.0, 'rope_parameters\.rope_theta': 6\.0\}: keep one of them$",
        ),
        (  # transformers reads rope_scaling alone, and gives it the default
            {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 6.0}},
            r": contradicting values \{'rope_parameters\.rope_theta': 6\.0, 'the default of rope_theta': 10000\.0\}: ",
        ),
        ({"rope_theta": None}, r": rope_theta is null: give a number, or remove the field for the default$"),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": None}},
            r": rope_parameters\.rope_theta is null: give a number, or remove the field for the default$",
        ),
        (
            {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}},
            r": rope_scaling\.rope_type is null: give a value, or remove the field for the default$",
        ),
        ({"rope_scaling": {"type": None}}, r": rope_scaling\.type is null: give a value, or"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_what_is_not_implemented_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here/config\\.json{message}"):
        parse(**values)


FILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta of 4": {"rope_theta": 500.0},
    "theta of 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear of 4": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "linear of 5": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn of a shorter model": {"rope_scaling": YARN | {"original_max_position_embeddings": 32}},
    "yarn of another growth": {"rope_scaling": {**YARN, "factor": 3.0, "original_max_position_embeddings": 16}},
    "yarn, all of it": {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0.8, "beta_fast": 4.0, "beta_slow": 0.5},
    },
    "yarn with scales": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.5}},
    "yarn with one scale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}},
    "yarn with scales and what they stand for": {
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.5, "attention_factor": 1.25}
    },
    "yarn whose factor follows": {
        "rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    },
    "an original length outside": {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    "original lengths outside and inside": {
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
        "original_max_position_embeddings": 16,
    },
    "an original length of dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    },
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "llama3 of 5": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
}


def their_frequencies(values: dict[str, Any]) -> tuple[np.ndarray, float]:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(LlamaConfig(**values))
    return rotary.inv_freq.numpy(), rotary.attention_scaling


TABLES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {
        "factor": 3.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
    "llama3": LLAMA3 | {"original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("table", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("kind", "null"),
    [(kind, name) for kind in TABLES for name in ("rope_type", "type", "rope_theta", *TABLES[kind])]
    + [(kind, "partial_rotary_factor") for kind in TABLES],
)
def test_a_null_means_what_it_means_to_transformers_or_is_refused(kind: str, null: str, table: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
    values = sizes | {table: {"rope_type": kind, "type": kind} | TABLES[kind] | {null: None}}
    if null == "type":
        values[table]["rope_type"] = kind
    try:
        theirs, their_magnitude = their_frequencies(copy.deepcopy(values))  # which are changed in place
    except Exception:  # in any way that Python, torch or the library can refuse
        theirs, their_magnitude = None, None
    try:
        config = parse_config({"model_type": "llama"} | values, "here")[1]
    except ValueError as error:
        assert null in str(error)
        assert theirs is None
        return
    assert theirs is not None
    ours, magnitude = scaled_frequencies(config.head_size, config.rope_theta, position_scheme(config).scaling)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(their_magnitude)


@pytest.mark.parametrize("name", FILES)
def test_frequencies_equal_transformers(name: str) -> None:
    values = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64} | FILES[name]
    config = parse_config({"model_type": "llama"} | values, "here")[1]
    ours, magnitude = scaled_frequencies(config.head_size, config.rope_theta, position_scheme(config).scaling)
    theirs, their_magnitude = their_frequencies(values)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(their_magnitude)


WRITTEN: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 3.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5},
    "llama3": {"factor": 3.0, "original_max_position_embeddings": 16, "low_freq_factor": 0.5, "high_freq_factor": 2.0},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_scalings_are_written_for_both_generations(name: str) -> None:
    written = rope_json(small_config(rope_theta=777.0, rope_scaling=RopeScaling(name=name, **WRITTEN[name])))
    table = {"rope_type": name} | WRITTEN[name]
    assert written == {
        "rope_theta": 777.0,
        "rope_scaling": table,
        "rope_parameters": table | {"rope_theta": 777.0},
    }


def test_what_none_means_is_written() -> None:
    settings = {"rope_scaling": RopeScaling(name="yarn", factor=2.0), "max_position_embeddings": 48}
    table = rope_json(small_config(**settings))["rope_scaling"]
    assert table["original_max_position_embeddings"] == 48
    assert "attention_factor" not in table


def test_without_scaling_no_table_of_the_old_generation_is_written() -> None:
    assert rope_json(small_config()) == {
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


@pytest.mark.parametrize("name", ["none", *WRITTEN])
def test_what_is_written_is_read_again(name: str) -> None:
    scaling = RopeScaling(name=name, **WRITTEN.get(name, {}))
    written = rope_json(small_config(rope_theta=777.0, rope_scaling=scaling))
    assert parse(**written) == (777.0, scaling)
    del written["rope_parameters"]
    assert parse(**written) == (777.0, scaling)


def test_what_nobody_reads_is_told(caplog: pytest.LogCaptureFixture) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert parse(rope_parameters=dynamic | {"original_max_position_embeddings": 8}) == parse(rope_parameters=dynamic)
    assert caplog.messages == [
        "here/config.json: rope_parameters.original_max_position_embeddings: nothing of rope_type 'dynamic' reads it, "
        "here or in transformers"
    ]
    caplog.clear()
    parse(rope_parameters=dynamic, original_max_position_embeddings=8)  # Phi-3 has it always
    assert not caplog.messages

"""Scaled rotary frequencies against those of transformers, and against their formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.rotary import Scaling
from stellarbyte_jax.ops.rotary.angles import rotary_frequencies
from stellarbyte_jax.ops.rotary.scaling import dynamic_frequencies, scaled_frequencies

NEEDS_TORCH = "the peer is transformers on torch: pip install -e '.[torch]'"
HEAD = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear", "factor": 3.0},
    "linear-1": {"name": "linear", "factor": 1.0},
    "yarn": {"name": "yarn", "factor": 4.0, "max_positions": 8192, "original_positions": 2048},
    "yarn-original-absent": {"name": "yarn", "factor": 2.5, "max_positions": 4096, "original_positions": None},
    "yarn-1": {"name": "yarn", "factor": 1.0},
    "yarn-betas": {"name": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "theta": 5e5},
    "yarn-attention": {"name": "yarn", "factor": 8.0, "attention_factor": 0.7},
    "yarn-short": {"name": "yarn", "factor": 8.0, "original_positions": 40},  # the ramp begins before pair 0
    "yarn-step": {"name": "yarn", "factor": 8.0, "beta_fast": 1.0, "beta_slow": 1.0, "head_size": 2},
    "yarn-small-heads": {"name": "yarn", "factor": 8.0, "head_size": 8, "theta": 100.0},
    "llama3": {
        "name": "llama3",
        "factor": 8.0,
        "max_positions": 131072,
        "original_positions": 8192,
        "theta": 5e5,
    },
    "llama3-factors": {
        "name": "llama3",
        "factor": 32.0,
        "original_positions": 512,
        "low_freq_factor": 2.0,
        "high_freq_factor": 9.0,
    },
    "llama3-original-absent": {"name": "llama3", "factor": 8.0, "original_positions": None},
}
DEFAULTS: dict[str, Any] = {
    "head_size": HEAD,
    "theta": 10000.0,
    "factor": 1.0,
    "max_positions": 2048,
    "original_positions": 1024,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": None,
}


def frequencies_of(settings: dict[str, Any]) -> tuple[Any, float]:
    rest = {name: value for name, value in settings.items() if name not in ("head_size", "theta")}
    return scaled_frequencies(settings["head_size"], settings["theta"], Scaling(**rest))


def peers(settings: dict[str, Any], length: int | None = None) -> tuple[np.ndarray, float]:
    """What transformers computes for the same settings."""
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = {
        "linear": (),
        "dynamic": (),
        "yarn": ("beta_fast", "beta_slow", "attention_factor"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }[settings["name"]]
    table = {"rope_type": settings["name"], "rope_theta": settings["theta"], "factor": settings["factor"]}
    table |= {name: settings[name] for name in fields if settings[name] is not None}
    if settings["name"] in ("yarn", "llama3") and settings["original_positions"] is not None:
        table["original_max_position_embeddings"] = settings["original_positions"]
    config = LlamaConfig(
        hidden_size=settings["head_size"],
        num_attention_heads=1,
        max_position_embeddings=settings["max_positions"],
        rope_parameters=table,
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[settings["name"]](config, seq_len=length)
    return frequencies.numpy(), magnitude


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_equal_transformers(name: str) -> None:
    settings = DEFAULTS | SETTINGS[name]
    ours, magnitude = frequencies_of(settings)
    theirs, their_magnitude = peers(settings)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-6, atol=0)
    assert magnitude == their_magnitude


@pytest.mark.parametrize("length", [1, 2048, 2049, 3000, 16384])
@pytest.mark.parametrize(("theta", "factor"), [(10000.0, 2.0), (5e5, 3.3), (10000.0, 1.0)])
def test_dynamic_frequencies_equal_transformers(theta: float, factor: float, length: int) -> None:
    settings = DEFAULTS | {"name": "dynamic", "theta": theta, "factor": factor}
    scaling = Scaling(max_positions=2048, name="dynamic", factor=factor)
    ours = dynamic_frequencies(jnp.full((2, 3), length, jnp.int32), HEAD, theta, scaling)
    assert ours.shape == (2, 3, HEAD // 2) and ours.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(ours[1, 2]), peers(settings, length)[0], rtol=3e-6, atol=0)
    np.testing.assert_array_equal(np.asarray(ours), np.broadcast_to(np.asarray(ours[0, 0]), ours.shape))


def test_dynamic_frequencies_are_plain_up_to_the_trained_length_and_fall_beyond() -> None:
    lengths_BT = jax.device_put(np.asarray([[1, 2047, 2048, 2049, 4096]], np.int32))
    scaling = Scaling(max_positions=2048, name="dynamic", factor=3.3)
    got = jax.jit(dynamic_frequencies, static_argnums=(1, 2, 3))(lengths_BT, HEAD, 10000.0, scaling)
    plain = np.asarray(rotary_frequencies(HEAD, 10000.0))
    for t in range(3):
        np.testing.assert_allclose(np.asarray(got[0, t]), plain, rtol=2e-7)
    slowed = plain / np.asarray(got[0, 4])
    assert slowed[0] == 1
    assert (np.diff(slowed) > 0).all()
    np.testing.assert_allclose(slowed[-1], 3.3 * 2 - 2.3, rtol=1e-6)


@pytest.mark.parametrize("scaling", ["none", "dynamic"])
def test_without_scaling_frequencies_are_plain(scaling: str) -> None:
    frequencies, magnitude = frequencies_of(DEFAULTS | {"name": scaling, "factor": 4.0})
    np.testing.assert_array_equal(np.asarray(frequencies), np.asarray(rotary_frequencies(HEAD, 10000.0)))
    assert magnitude == 1


def test_fast_pairs_stay_and_slow_pairs_are_stretched() -> None:
    plain = np.asarray(rotary_frequencies(HEAD, 10000.0))
    rotations = plain * 1024 / (2 * np.pi)
    for scaling, fast, slow in (("yarn", 32, 1), ("llama3", 4, 1)):
        frequencies, _ = frequencies_of(DEFAULTS | {"name": scaling, "factor": 8.0})
        ratio = plain / np.asarray(frequencies)
        # YaRN's ramp begins and ends at whole pairs, so one pair at either end is not quite what the rotations say.
        np.testing.assert_allclose(ratio[rotations > fast][:-1], 1, rtol=1e-6)
        np.testing.assert_allclose(ratio[rotations < slow][1:], 8, rtol=1e-6)
        assert ((ratio > 1.01) & (ratio < 7.99)).any()


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scaling must be 'none', .*got 'longrope'"):
        frequencies_of(DEFAULTS | {"name": "longrope"})
    with pytest.raises(ValueError, match="theta must be above 1, got 1"):
        frequencies_of(DEFAULTS | {"name": "yarn", "theta": 1.0})


@pytest.mark.parametrize(
    ("name", "longest"), [("none", 16), ("linear", 40), ("dynamic", 40), ("yarn", 16), ("llama3", 16)]
)
def test_the_longest_text_of_each_scaling(name: str, longest: int) -> None:
    """With yarn and llama3 the positions given are those of the stretched model already."""
    assert Scaling(max_positions=16, name=name, factor=2.5).max_length == longest

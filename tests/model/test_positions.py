"""A config names its position scheme once, and every setting of it arrives."""

import dataclasses

import pytest
from helpers.variants import BASE

from stellarbyte_jax.config import RopeScaling
from stellarbyte_jax.model.positions import position_scheme
from stellarbyte_jax.ops.rotary import Rope, Scaling, StellarByteRope, XPos

PLAIN = Scaling(max_positions=64)
CASES = {
    "rope": ({}, Rope(head_size=8, theta=10000.0, pairing="half", scaling=PLAIN)),
    "pairing, theta, head size": (
        {"rope_pairing": "interleaved", "rope_theta": 500.0, "head_dim": 12},
        Rope(head_size=12, theta=500.0, pairing="interleaved", scaling=PLAIN),
    ),
    "xpos": (
        {"position_embedding": "xpos", "xpos_scale_base": 7.0, "rope_pairing": "interleaved"},
        XPos(head_size=8, theta=10000.0, pairing="interleaved", scaling=PLAIN, scale_base=7.0),
    ),
    "learned xpos": (
        {"position_embedding": "xpos", "xpos_learnable": True},
        XPos(head_size=8, theta=10000.0, pairing="half", scaling=PLAIN, scale_base=512.0, learnable=True),
    ),
    "the original's": (
        {"position_embedding": "stellarbyte", "xpos_scale_base": 7.0},
        StellarByteRope(head_size=8, theta=10000.0, pairing="mixed", scaling=PLAIN, scale_base=7.0),
    ),
    "yarn": (
        {
            "rope_scaling": RopeScaling(
                name="yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=20.0,
                beta_slow=2.0,
                attention_factor=1.5,
            )
        },
        Rope(
            head_size=8,
            theta=10000.0,
            pairing="half",
            scaling=Scaling(
                max_positions=64,
                name="yarn",
                factor=4.0,
                original_positions=16,
                beta_fast=20.0,
                beta_slow=2.0,
                attention_factor=1.5,
            ),
        ),
    ),
    "llama3": (
        {
            "rope_scaling": RopeScaling(
                name="llama3",
                factor=8.0,
                original_max_position_embeddings=32,
                low_freq_factor=2.0,
                high_freq_factor=5.0,
            )
        },
        Rope(
            head_size=8,
            theta=10000.0,
            pairing="half",
            scaling=Scaling(
                max_positions=64,
                name="llama3",
                factor=8.0,
                original_positions=32,
                low_freq_factor=2.0,
                high_freq_factor=5.0,
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_scheme_of_a_config(name):
    settings, expected = CASES[name]
    assert position_scheme(dataclasses.replace(BASE, **settings)) == expected

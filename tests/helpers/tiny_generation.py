"""A tiny network for generation of long texts, and what its tests share."""

import dataclasses
import functools

import jax
import numpy as np

from stellarbyte_jax import ByteConfig, ByteTransformer, generate
from stellarbyte_jax.model.decoder import init_params

TRAINED, LONG = 16, 64
BASE = ByteConfig(
    vocab_size=41,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=TRAINED,
    compute_dtype="float32",
    initializer_range=0.4,
)
PROMPTS = [[5, 9, 2, 7, 7, 1, 8, 4], [3], list(range(1, 20))]


# Settings that no weight depends on: networks that differ in them alone have the same ones.
_WITHOUT_WEIGHTS = {
    "cache",
    "layer_types",
    "max_position_embeddings",
    "memory",
    "rope_scaling",
    "sink_tokens",
    "sliding_window",
    "xpos_scale_base",
}


@functools.cache
def make(**changes):
    of_weights = {name: x for name, x in changes.items() if name not in _WITHOUT_WEIGHTS}
    return ByteTransformer(dataclasses.replace(BASE, **changes)), _weights(tuple(of_weights.items()))


@functools.cache
def _weights(changes):
    model = ByteTransformer(dataclasses.replace(BASE, **dict(changes)))
    return jax.jit(lambda: init_params(model, jax.random.key(3)))()


def continue_to(length, model, params, prompts, **settings):
    """Greedy tokens in short blocks alone, which spares a test the compilation of the long one."""
    return generate(model, params, prompts, max_length=length, log_probs=True, stream=lambda new: None, **settings)


def some_rows(B, T, seed=0):
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, (B, T)).astype(np.int32)

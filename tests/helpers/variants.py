"""Tiny networks that between them use every setting of the decoder, for tests that all must pass."""

import dataclasses
import functools
from functools import partial
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward, forward_step, init_params, logits, trained
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.state.router import RouterState
from stellarbyte_jax.model.trees import partition

BASE = ByteConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    compute_dtype="float32",
)
VARIANTS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "xpos, geglu": {"position_embedding": "xpos", "xpos_scale_base": 8.0, "hidden_act": "gelu_pytorch_tanh"},
    "window": {"sliding_window": 5},
    "mixed windows, qk norm, bias": {
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "qk_norm": True,
        "attention_bias": True,
    },
    "one key head, cap, clamp, interleaved": {
        "num_key_value_heads": 1,
        "attention_logit_softcap": 3.0,
        "rms_norm_eps_rule": "clamp",
        "rope_pairing": "interleaved",
    },
    "parallel, branch scale, layer scale, biases, yarn": {
        "parallel_residual": True,
        "residual_scaling": "branch",
        "layer_scale_init": 0.5,
        "attention_output_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "deepnorm, learned xpos, padded vocabulary": {
        "residual_scaling": "deepnorm",
        "position_embedding": "xpos",
        "xpos_learnable": True,
        "rope_pairing": "interleaved",
        "vocab_size_multiple": 16,
    },
    "the original's own": {
        "position_embedding": "stellarbyte",
        "xpos_learnable": True,
        "mlp_style": "stellarbyte",
        "residual_scaling": "branch",
        "rms_norm_eps": 0.1,  # not that of the norm in the MLP
        "initialization": "stellarbyte",
    },
    "windows, sinks, pruned weights, cap": {
        "sliding_window": 4,
        "sink_tokens": 2,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "attention_prune_below": 0.1,
        "attention_logit_softcap": 5.0,
        "tie_word_embeddings": True,
    },
    "experts": {"moe": {"num_experts": 6, "intermediate_size": 24}},
    "a dense layer, experts by sigmoid in groups, one shared, windows": {
        "moe": {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
        "sliding_window": 5,
        "layer_types": ("full_attention", *("sliding_attention",) * 3),
    },
    "experts in every second layer, by context, priority and temperature": {
        "moe": {
            "num_experts": 5,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "gate": "context",
            "context_size": 6,
            "gate_intermediate_size": 10,
            "history_decay": 0.7,
            "dynamic_k": 0.8,
            "expert_priority": True,
            "cooling_steps": 10,
            "adaptive_temperature": True,
        },
    },
    "experts of which some are twins": {"moe": {"num_experts": 6, "intermediate_size": 24, "rebalance_interval": 10}},
    "a pool of experts, parallel, xpos": {
        "moe": {"num_experts": 4, "shared_pool": True, "temperature": 0.5, "mlp_only_layers": (2,)},
        "parallel_residual": True,
        "position_embedding": "xpos",
    },
}


@partial(jax.jit, static_argnums=0)
def call(model, params, inputs, state=None, dropout_key=None):
    """float32 logits [B, T, V] and the whole output of a call."""
    out = forward(model, params, inputs, state, dropout_key=dropout_key)
    return logits(model, params, out.hidden_BTD), out


def run(model, params, tokens_BT, *, dropout_key=None, **inputs):
    """Logits of tokens without earlier ones."""
    return call(model, params, Inputs(jax.device_put(tokens_BT), **inputs), None, dropout_key)[0]


def run_on(model, params, tokens_BT, *, cache=None, memory=None, router=None, **inputs):
    """Logits of tokens after those in a cache or a memory, and the state after them."""
    if router is None and cache is not None:
        router = RouterState.initial(model.config, cache.batch_size)
    found, out = call(model, params, Inputs(jax.device_put(tokens_BT), **inputs), State(cache, memory, router))
    return found, out.state


step = jax.jit(forward_step, static_argnums=0)


def make(variant, **more):
    model, params = make_model(dataclasses.replace(BASE, **{**VARIANTS[variant], **more}))
    return model, params if model.config.moe.rebalance_interval is None else with_twins(params, ((1, 4), (2, 5)))


# What no weight depends on: variants that differ in these alone have the same ones.
OF_NO_WEIGHT = dict.fromkeys(("hidden_dropout", "residual_dropout", "attention_dropout", "drop_path"), 0.0)
OF_NO_WEIGHT |= {
    "compute_dtype": "float32",
    "matmul_dtype": "compute",
    "remat": "none",
    "scan_unroll": 1,
    "attention_implementation": "auto",
}


def make_model(config):
    """The model and weights of which every one matters: biases and norms start as constants."""
    kept = _some_weights(dataclasses.replace(config, **OF_NO_WEIGHT))
    return ByteTransformer(config), jax.tree.map(lambda x: x, kept)  # dicts of its own, to write into


@functools.cache
def _some_weights(config):
    """Initial weights and a little more; random numbers are numpy's, of which each shape compiles nothing."""

    @jax.jit
    def initial(deviations):
        def normal(std):
            return lambda key, shape, dtype: jnp.full(shape, std * deviations, dtype)

        with mock.patch.object(nn.initializers, "normal", normal):
            return init_params(ByteTransformer(config), jax.random.key(0))

    means, ends = (jax.tree.map(np.asarray, initial(np.float32(x))) for x in (0, 1))
    random = np.random.default_rng(1)

    def drawn(mean, end):
        spread = np.hypot(end - mean, np.float32(0.1))
        return jax.device_put(mean + spread * random.standard_normal(mean.shape, np.float32))

    return jax.tree.map(drawn, means, ends)


def with_twins(params, pairs, steps=3.0):
    """The weights with these experts as twins that exclude each other yet, in every second layer of each stack."""

    def changed(path, x):
        name = path[-1].key
        if name not in ("twin", "twin_steps"):
            return x
        x = np.array(x)
        for one, other in pairs:
            x[::2, [one, other]] = (other, one) if name == "twin" else steps
        return jax.device_put(x)

    return jax.tree_util.tree_map_with_path(changed, params)


def weights_alone(model, params):
    """A tree without what gradients do not reach."""
    return partition(params, trained(model))[0]


@partial(jax.jit, static_argnums=0)
def init(model):
    return init_params(model, jax.random.key(0))


def some_tokens(*shape, seed=2):
    return jax.device_put(np.random.default_rng(seed).integers(0, BASE.vocab_size, shape, dtype=np.int32))


def mean_nll(params, model, tokens_BT):
    """Mean negative log-likelihood of each token but the first."""
    logits_BTV = call(model, params, Inputs(tokens_BT))[0]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits_BTV[:, :-1]), tokens_BT[:, 1:, None], axis=-1))


slopes_of_nll = jax.jit(jax.grad(mean_nll), static_argnums=1)

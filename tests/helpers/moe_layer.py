"""One layer with experts, with weights and tokens to call it with."""

import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from helpers.variants import BASE
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.io import LayerState
from stellarbyte_jax.model.moe import MoE
from stellarbyte_jax.model.state.router import RouterState

D, E = 6, 5


def config_of(**moe):
    moe = {"num_experts": E, "intermediate_size": 4, **moe}
    return dataclasses.replace(
        BASE, hidden_size=D, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, moe=moe
    )


CAPACITY = {"dispatch": "capacity", "min_capacity": 1}


def context(valid, starts=None, train=True):
    """Rows of one document each, or of documents that begin where ``starts`` is true."""
    B, T = valid.shape
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    if starts is not None:
        positions = np.where(starts, 0, positions + 1).astype(np.int32)
    return LayerContext(
        jax.device_put(positions), jax.device_put(positions[:1]), None, None, None, train, jax.device_put(valid)
    )


def weights_of(config, seed=0):
    made, random = _initial(config), np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * random.standard_normal(x.shape) + x, "float32"), made)


@functools.cache
def _initial(config):
    ctx = context(np.ones((1, 1), bool), train=False)
    initial = jax.jit(lambda x: MoE(config).init(jax.random.key(0), x, ctx, LayerState())["params"])
    return jax.tree.map(np.asarray, nn.meta.unbox(initial(np.zeros((1, 1, D), np.float32))))


@partial(jax.jit, static_argnums=0)
def layer(config, weights, x, ctx, tally=None):
    state = LayerState() if tally is None else LayerState(router=RouterState(tally=tally))
    rngs = {"dropout": jax.random.key(3)} if ctx.train else None
    out, state, aux = MoE(config).apply({"params": weights}, x, ctx, state, rngs=rngs)
    return out, None if state.router is None else state.router.tally, aux


def tokens(B, T, seed=0):
    random = np.random.default_rng(seed)
    valid = random.random((B, T)) < 0.8
    valid[0] = True
    return jax.device_put(np.asarray(random.standard_normal((B, T, D)), np.float32)), valid

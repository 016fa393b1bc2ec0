"""Networks with adapters that have learnt something, and what these are by hand."""

import dataclasses
import functools

import jax
import numpy as np

from helpers.variants import BASE, make_model
from stellarbyte_jax.lora import split, with_adapters
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import merge

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
DENSE = dataclasses.replace(BASE, num_hidden_layers=3)
EXPERTS = dataclasses.replace(BASE, num_hidden_layers=2, moe=MOE)
TIED = dataclasses.replace(BASE, num_hidden_layers=1, tie_word_embeddings=True)
# Of the weight with adapters, without the axis of layers: a, b -> weight.
_BY_HAND = {
    **dict.fromkeys(("q", "k", "v"), "dr,rnh->dnh"),
    "o": "nhr,rd->nhd",
    "gate_up": "gdr,grf->dgf",
    "down": "fr,rd->fd",
    "experts gate_up": "egdr,egrf->edgf",
    "experts down": "efr,erd->efd",
    "kernel": "dr,rv->dv",
    "embedding": "vr,rd->vd",
}


def adapted(config, seed=0, **lora):
    """The network with adapters of settings that are random in all they may learn, and its weights."""
    config = dataclasses.replace(config, lora={"r": 3, **lora})
    model = ByteTransformer(config)
    return model, merge(*_weights(config, seed))


@functools.cache
def _weights(config, seed):
    base = make_model(config.without_adapters)[1]
    adapters, base = split(with_adapters(ByteTransformer(config), base, jax.random.key(seed)))
    return learnt(adapters, seed), base


def learnt(adapters, seed=0):
    """Adapters with other numbers in all that they may learn."""
    numbers = np.random.default_rng(seed)

    def moved(path, x):
        name = path[-1].key
        if name.endswith("_scale"):
            return x
        drawn = np.float32(0.2) * numbers.standard_normal(x.shape, np.float32)
        return jax.device_put(np.asarray(x) * (1 + drawn) if name.endswith("_m") else drawn)

    return jax.tree_util.tree_map_with_path(moved, adapters)


def merged_by_hand(tree, path=()):
    """Weights with their adapters in them, float32 arrays of numpy, without the adapters."""
    made = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            made[name] = merged_by_hand(value, (*path, name))
        elif "_lora_" not in name:
            made[name] = np.asarray(value, np.float32)
            if name + "_lora_a" in tree:
                parts = [np.asarray(tree[name + end]) for end in ("_lora_a", "_lora_b", "_lora_scale")]
                made[name] = _with(name, path, made[name], *parts, tree.get(name + "_lora_m"))
    return made


def _with(name, path, weight, a, b, scale, magnitude):
    kind = f"experts {name}" if path[-1] in ("experts", "pool") else name
    spec, stacked = _BY_HAND[kind], np.ndim(scale) == 1
    left, result = spec.split("->")
    one, other = left.split(",")
    full = f"L{one},L{other},L->L{result}" if stacked else f"{one},{other},->{result}"
    whole = weight + np.einsum(full, a, b, scale)
    if magnitude is None:
        return whole
    at = tuple(result.index(letter) + stacked for letter in one if letter in result and letter not in other)
    length = np.sqrt(np.sum(whole**2, axis=at, keepdims=True))
    share = np.expand_dims(np.asarray(magnitude), at) / length
    has = np.asarray(scale).reshape((-1,) + (1,) * (whole.ndim - 1)) > 0 if stacked else True
    return np.where(has, whole * share, whole)

"""Bytes that a model takes in training and in generation, from shapes alone: ``jax.eval_shape`` computes nothing."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect.costs import count_parameters
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses
from stellarbyte_jax.model.params import WeightUse
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.storage import Storage
from stellarbyte_jax.model.trees import IsTrainable, all_trainable, partition

OptimizerName = Literal["adamw", "lion", "muon"]
CacheDtype = Literal["compute", "float32", "bfloat16", "int8", "float8_e4m3fn"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "lion", "muon")
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES: tuple[CacheDtype, ...] = ("float32", "bfloat16", "int8", "float8_e4m3fn")
_FLOAT32 = 4
_LOSS_CHUNK = 4096  # tokens whose logits exist at once, the default of ops.cross_entropy


@dataclass(frozen=True)
class TrainingBytes:
    """What a training step holds on the device, in bytes.

    Attributes:
      weights: float32, trained and frozen ones.
      gradients: float32, of the trained ones.
      optimizer: its state, see :func:`optimizer_bytes`.
      average: the moving average of the trained weights, 0 where none is kept.
      activations: an estimate, see :func:`activation_bytes`.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


def training_bytes(
    model: ByteTransformer,
    *,
    optimizer: OptimizerName,
    rows: int,
    length: int,
    average: bool = False,
    is_trainable: IsTrainable = all_trainable,
) -> TrainingBytes:
    """The memory of a training step on one device.

    Args:
      model: the network.
      optimizer: name of the update rule.
      rows: sequences whose forward and backward pass run at once, those of one accumulated part.
      length: tokens of a row.
      average: whether a moving average of the weights is kept.
      is_trainable: of a weight's path.
    """
    shapes = param_shapes(model)
    trained = count_parameters(partition(shapes, is_trainable)[0]) * _FLOAT32
    return TrainingBytes(
        weights=weight_bytes(count_parameters(shapes), "float32"),
        gradients=trained,
        optimizer=optimizer_bytes(model, optimizer, is_trainable),
        average=trained if average else 0,
        activations=activation_bytes(model.config, rows, length),
    )


def weight_bytes(parameters: int, dtype: str) -> int:
    """Bytes of so many weights in a dtype."""
    return parameters * jnp.dtype(dtype).itemsize


def optimizer_bytes(model: ByteTransformer, name: OptimizerName, is_trainable: IsTrainable = all_trainable) -> int:
    """Bytes of the float32 arrays of an optimizer's state; counters and coefficients are left out.

    AdamW has two numbers a weight, Lion one, Muon one for the matrices that it orthogonalises and two for the others.
    """
    if name != "muon":
        return (
            count_parameters(partition(param_shapes(model), is_trainable)[0]) * _FLOAT32 * {"adamw": 2, "lion": 1}[name]
        )
    shapes, _ = partition(param_shapes(model), is_trainable)
    uses, _ = partition(param_uses(model), is_trainable)
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(uses, is_leaf=_is_use), strict=True)
    return sum(shape.size * _FLOAT32 * (1 if use.is_hidden_matrix else 2) for shape, use in leaves)


def _is_use(x: object) -> bool:
    return isinstance(x, WeightUse)


def activation_bytes(config: ByteConfig, rows: int, length: int) -> int:
    """An estimate of what the forward pass keeps for the backward pass, with fused attention and without dropout.

    For each token, with c bytes a number of the compute dtype, D, N, K, H, F as elsewhere and L layers:

    - ``remat=none``: ``L (c (4 D + 2 N H + 2 K H + 3 F) + 4 N)``: inputs and norms of both branches (of one where they
      are parallel), queries, keys, values, attention's result and its normaliser, gate, up and their product.
    - ``dots``: ``L c (2 D + N H + 2 K H + 2 F)``: each layer's input and what the backward pass needs of the results of
      products: ``D`` less where branches are parallel, ``D`` more with deepnorm.
    - ``full``: ``L c D``: each layer's input. The last two make one layer's own activations anew, as of ``none``.

    Besides ``2 c D`` for embedding and final norm, and float32 logits and their gradients, ``8 V`` for each of at most
    4096 tokens. Each of a memory's M slots of a row counts as a token's input, keys and values.
    """
    D, F, V = config.hidden_size, config.mlp_size, config.padded_vocab_size
    q, kv = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    c = jnp.dtype(config.compute_dtype).itemsize
    layers, tokens = config.num_hidden_layers, rows * length
    branches = 1 if config.parallel_residual else 2
    sums = branches + (config.residual_scaling == "deepnorm")  # of a stream, the layer's input among them
    layer = c * (2 * branches * D + 2 * q + 2 * kv + 3 * F) + _FLOAT32 * config.num_attention_heads
    kept = {"none": layer, "dots": c * (sums * D + q + 2 * kv + 2 * F), "full": c * D}[config.remat]
    again = 0 if config.remat == "none" else layer
    memory = rows * sum(spec.memory_slots for spec in config.layer_specs) * c * (D + 2 * kv)
    return tokens * (layers * kept + again + 2 * c * D) + memory + min(_LOSS_CHUNK, tokens) * 2 * _FLOAT32 * V


def cache_bytes(config: ByteConfig, batch_size: int, length: int, dtype: CacheDtype = "compute") -> int:
    """Bytes of keys, values and scales of the cache for ``length`` tokens a row, as ``Cache.nbytes`` counts them.

    Windowed layers have a ring, a pruned cache has its slots whatever the length. ``dtype`` of ``compute`` is the
    config's own.
    """
    if dtype != "compute":
        config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, dtype=dtype))
    cache = jax.eval_shape(lambda: make_cache(config, batch_size, length))
    storages = [x for x in jax.tree.leaves(cache.groups, is_leaf=_is_storage) if _is_storage(x)]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(storages))


def _is_storage(x: object) -> bool:
    return isinstance(x, Storage)


@dataclass(frozen=True)
class CacheGrowth:
    """Bytes that the cache of a row grows by with each token.

    Attributes:
      at_first: while every window has room.
      later: once all windows are full; 0 where every layer has one, or the cache is pruned.
    """

    at_first: int
    later: int


def cache_growth(config: ByteConfig, dtype: CacheDtype = "compute") -> CacheGrowth:
    """How the cache grows, from its size at lengths that differ by one token."""
    longest = max((w for w in config.windows if w is not None), default=1)

    def of_token(length: int) -> int:
        return cache_bytes(config, 1, length + 1, dtype) - cache_bytes(config, 1, length, dtype)

    return CacheGrowth(of_token(1), of_token(longest + 1))

"""Bytes that a model takes in training and in generation, from shapes alone: ``jax.eval_shape`` computes nothing."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect.activations import activation_bytes
from stellarbyte_jax.inspect.costs import count_parameters
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses, trained, weights_alone
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


@dataclass(frozen=True)
class TrainingBytes:
    """What a training step holds on the device, in bytes.

    Attributes:
      weights: float32, trained and frozen ones.
      gradients: float32, of the trained ones.
      optimizer: its state, see :func:`optimizer_bytes`.
      average: the moving average of the trained weights, 0 where none is kept.
      activations: an estimate, see :func:`activations.activations_of`.
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
    weights = partition(shapes, weights_alone(model))[0]
    trainable, others = partition(weights, trained(model, is_trainable))
    gradients, frozen = count_parameters(trainable) * _FLOAT32, count_parameters(others)
    return TrainingBytes(
        weights=gradients + frozen * jnp.dtype(model.config.lora.base_dtype).itemsize,
        gradients=gradients,
        optimizer=optimizer_bytes(model, optimizer, is_trainable),
        average=gradients if average else 0,
        activations=activation_bytes(model.config, rows, length),
    )


def weight_bytes(parameters: int, dtype: str) -> int:
    """Bytes of so many weights in a dtype."""
    return parameters * jnp.dtype(dtype).itemsize


def optimizer_bytes(model: ByteTransformer, name: OptimizerName, is_trainable: IsTrainable = all_trainable) -> int:
    """Bytes of the float32 arrays of an optimizer's state; counters and coefficients are left out.

    AdamW has two numbers a weight, Lion one, Muon one for the matrices that it orthogonalises and two for the others.
    """
    is_trained = trained(model, is_trainable)
    shapes, _ = partition(param_shapes(model), is_trained)
    if name != "muon":
        return count_parameters(shapes) * _FLOAT32 * {"adamw": 2, "lion": 1}[name]
    uses, _ = partition(param_uses(model), is_trained)
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(uses, is_leaf=_is_use), strict=True)
    return sum(shape.size * _FLOAT32 * (1 if use.is_hidden_matrix else 2) for shape, use in leaves)


def _is_use(x: object) -> bool:
    return isinstance(x, WeightUse)


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

"""Bytes that a model takes in training and in generation, from shapes alone: ``jax.eval_shape`` computes nothing."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect.costs import count_parameters
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses, trained
from stellarbyte_jax.model.params import WeightUse
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.storage import Storage
from stellarbyte_jax.model.trees import IsTrainable, all_trainable, partition
from stellarbyte_jax.ops.expert_layout import lay_out

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
    gradients = count_parameters(partition(shapes, trained(model, is_trainable))[0]) * _FLOAT32
    return TrainingBytes(
        weights=weight_bytes(count_parameters(partition(shapes, trained(model))[0]), "float32"),
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


def activation_bytes(config: ByteConfig, rows: int, length: int) -> int:
    """An estimate of what the forward pass keeps for the backward pass, with fused attention and without dropout.

    For each token, with c bytes a number of the compute dtype, D, N, K, H, F as elsewhere and L layers:

    - ``remat=none``: ``L (c (4 D + 2 N H + 2 K H + 3 F) + 4 N)``: inputs and norms of both branches (of one where they
      are parallel), queries, keys, values, attention's result and its normaliser, gate, up and their product.
    - ``dots``: ``L c (2 D + N H + 2 K H + 2 F)``: each layer's input and what the backward pass needs of the results of
      products: ``D`` less where branches are parallel, ``D`` more with deepnorm.
    - ``full``: ``L c D``: each layer's input. The last two make one layer's own activations anew, as of ``none``.

    A layer with E experts has S rows for all tokens, see :func:`expert_rows`. In place of ``3 F`` it keeps
    ``c S (2 D + 3 F)``, what goes into experts and comes out among it, ``3 F`` of the shared experts, and of the router
    ``4 (D + 2 E)``; with ``dots``, in place of ``2 F``, that of the shared experts and ``4 E``. A context gate keeps
    its features and layers besides. One layer at a time has the matrices of each block of rows, and their gradients.

    Besides ``2 c D`` for embedding and final norm, and float32 logits and their gradients, ``8 V`` for each of at most
    4096 tokens. Each of a memory's M slots of a row counts as a token's input, keys and values.
    """
    D, V = config.hidden_size, config.padded_vocab_size
    kv = config.kv_heads * config.head_size
    c = jnp.dtype(config.compute_dtype).itemsize
    tokens = rows * length
    dense = _dense_layer(config, tokens)
    with_experts = _layer_with_experts(config, tokens) if config.moe_layers else dense
    layers = [with_experts if spec.moe else dense for spec in config.layer_specs]
    kept = sum(getattr(layer, config.remat) for layer in layers)
    at_once = max(layer.working + (0 if config.remat == "none" else layer.none) for layer in layers)
    memory = rows * sum(spec.memory_slots for spec in config.layer_specs) * c * (D + 2 * kv)
    return kept + at_once + tokens * 2 * c * D + memory + min(_LOSS_CHUNK, tokens) * 2 * _FLOAT32 * V


@dataclass(frozen=True)
class _LayerBytes:
    """Of one layer: what it keeps with each value of ``remat``, and what it needs while it computes."""

    none: int
    dots: int
    full: int
    working: int = 0


def _dense_layer(config: ByteConfig, tokens: int) -> _LayerBytes:
    F, c = config.mlp_size, jnp.dtype(config.compute_dtype).itemsize
    around = _around_the_mlp(config, tokens)
    return _LayerBytes(around.none + tokens * c * 3 * F, around.dots + tokens * c * 2 * F, around.full)


def _layer_with_experts(config: ByteConfig, tokens: int) -> _LayerBytes:
    m, c = config.moe, jnp.dtype(config.compute_dtype).itemsize
    D, F, E = config.hidden_size, config.expert_size, m.num_experts
    sent, around = expert_rows(config, tokens), _around_the_mlp(config, tokens)
    shared = m.n_shared_experts * F
    logits = E * (2 if m.noise == "noisy_topk" else 1)
    none = c * sent.rows * (2 * D + 3 * F) + tokens * (c * 3 * shared + _FLOAT32 * (D + E + logits))
    dots = tokens * (c * 2 * shared + _FLOAT32 * logits)
    if m.gate == "context":
        C, inside = m.context_size, m.gate_intermediate_size or m.context_size
        features = D + C + max(1, C // 2) + (D if m.history_decay else 0)
        none += tokens * _FLOAT32 * (3 * features + 5 * inside + C)
        dots += tokens * _FLOAT32 * (features + 3 * inside + C)
    return _LayerBytes(around.none + none, around.dots + dots, around.full, 2 * c * sent.gathered * 2 * D * F)


def _around_the_mlp(config: ByteConfig, tokens: int) -> _LayerBytes:
    D, c = config.hidden_size, jnp.dtype(config.compute_dtype).itemsize
    q, kv = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    branches = 1 if config.parallel_residual else 2
    sums = branches + (config.residual_scaling == "deepnorm")  # of a stream, the layer's input among them
    none = c * (2 * branches * D + 2 * q + 2 * kv) + _FLOAT32 * config.num_attention_heads
    return _LayerBytes(tokens * none, tokens * c * (sums * D + q + 2 * kv), tokens * c * D)


class ExpertRows(NamedTuple):
    """What a layer with experts computes for some tokens.

    Attributes:
      rows: of all experts, with the empty ones that fill blocks or slots.
      gathered: blocks that get a copy of their expert's matrices; 0 where each expert has one.
    """

    rows: int
    gathered: int


def expert_rows(config: ByteConfig, tokens: int) -> ExpertRows:
    """Rows of the experts in a training step, as they are laid out for so many tokens."""
    m = config.moe
    if m.dispatch == "capacity":
        return ExpertRows(m.num_experts * m.slots(tokens), 0)
    experts_NK = jax.ShapeDtypeStruct((tokens, m.num_experts_per_tok), jnp.int32)
    layout = jax.eval_shape(lambda experts_NK: lay_out(experts_NK, m.num_experts), experts_NK)
    blocks = layout.groups.experts_G
    return ExpertRows(layout.pairs_S.shape[0], 0 if blocks is None else blocks.shape[0])


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

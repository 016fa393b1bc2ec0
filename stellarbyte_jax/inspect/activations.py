"""Bytes of activations in a training step, on one device or on one of a mesh: an estimate from the config alone."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect.ring_bytes import Ring
from stellarbyte_jax.model.params import FEW_ROWS
from stellarbyte_jax.ops.expert_layout import block_rows, lay_out, lay_out_unaligned, rows_of_share
from stellarbyte_jax.ops.grouped_matmul import Groups

_FLOAT32 = 4
_LOSS_CHUNK = 4096  # tokens whose logits exist at once, the default of ops.cross_entropy


@dataclass(frozen=True)
class Cut:
    """Into how many parts a mesh cuts what a device computes of its rows.

    Attributes:
      tensor: heads, channels and the vocabulary; rows or positions between layers.
      context: positions.
      expert: experts; each device gets the tokens of so many.
      packed: whether rows hold several documents. For these keys and values are repeated for every query head, but not
        where positions are cut.
    """

    tensor: int = 1
    context: int = 1
    expert: int = 1
    packed: bool = False


WHOLE = Cut()


@dataclass(frozen=True)
class Activations:
    """What a device holds between the forward and the backward pass, in bytes.

    Attributes:
      kept: by all layers, embedding, final norm and memory, as ``remat`` has it.
      working: of the layer that computes: what it makes anew, copies of experts' matrices, blocks of the ring.
      logits: float32 logits and their gradients of a chunk of tokens.
    """

    kept: int
    working: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


def activation_bytes(config: ByteConfig, rows: int, length: int) -> int:
    """All of :func:`activations_of` on one device."""
    return activations_of(config, rows, length).total


@functools.lru_cache(maxsize=4096)
def activations_of(config: ByteConfig, rows: int, length: int, cut: Cut = WHOLE) -> Activations:
    """An estimate of what the forward pass keeps for the backward pass, without dropout of activations.

    For each token, with c bytes a number of the compute dtype, D, N, K, H, F as elsewhere and L layers:

    - ``remat=none``: ``L (c (4 D + 2 N H + 2 K H + 3 F) + 4 N)``: inputs and norms of both branches (of one where they
      are parallel), queries, keys, values, attention's result and its normaliser, gate, up and their product. Besides
      ``c (N H + K H)`` each for norms of queries and keys and for learned XPos rates, ``2 c D`` for LayerScale, ``c F``
      for what is no plain SwiGLU, and ``N (4 + c)`` a key where no fused kernel computes attention.
    - ``weights``: the same; what it does not keep are gathered weights.
    - ``dots``: ``L c (2 D + N H + 2 K H + 2 F)``: each layer's input and what the backward pass needs of the results of
      products: ``D`` less where branches are parallel, ``D`` more with deepnorm.
    - ``full``: ``L c D``: each layer's input. The last two make one layer's own activations anew, as of ``none``.

    A layer with E experts has S rows for all tokens, see :func:`expert_rows`. In place of ``3 F`` it keeps
    ``c S (2 D + 3 F)``, what goes into experts and comes out among it, ``3 F`` of the shared experts, and of the router
    ``4 (D + 2 E)``; with ``dots``, in place of ``2 F``, that of the shared experts and ``4 E``. A context gate keeps
    its features and layers besides. One layer at a time has the matrices of each block of rows, and their
    gradients; layers that are no loop keep these copies. Devices that share the experts of a dropless layer keep the
    tokens of all of them.

    Besides ``2 c D`` for embedding and final norm, and float32 logits and their gradients, ``8 V`` for each of at most
    4096 tokens. Each of a memory's M slots of a row counts as a token's input, keys and values.

    On a mesh, inputs of branches lie where ``tensor`` cuts positions, and norms are whole; heads, F and V are cut.

    Args:
      config: of the model.
      rows: of the device, those that are computed at once.
      length: tokens of a whole row.
      cut: what other axes of a mesh cut.
    """
    D, V = config.hidden_size, config.padded_vocab_size // cut.tensor
    kv = config.kv_heads * config.head_size
    c = jnp.dtype(config.compute_dtype).itemsize
    sizes = _Sizes.of(config, rows, length, cut)
    dense = _dense_layer(config, sizes)
    with_experts = _layer_with_experts(config, sizes) if config.moe_layers else dense
    layers = [with_experts if spec.moe else dense for spec in config.layer_specs]
    again = [layer.working + (0 if config.remat in ("none", "weights") else layer.none) for layer in layers]
    memory = rows * sum(spec.memory_slots for spec in config.layer_specs) * c * (D + 2 * kv)
    return Activations(
        kept=sum(getattr(layer, "none" if config.remat == "weights" else config.remat) for layer in layers)
        + sizes.stream * 2 * c * D
        + memory,
        working=max(again),
        logits=min(_LOSS_CHUNK, sizes.tokens) * 2 * _FLOAT32 * V,
    )


@dataclass(frozen=True)
class _Sizes:
    """What a device has of a part of a batch.

    Attributes:
      cut: of the mesh.
      tokens: inside of layers.
      stream: tokens between layers.
      heads: query heads.
      q: channels of all its query heads.
      kv: channels of all its key heads: with fewer heads than devices each has all of them.
      keys: that a query has scores with.
      ring: of devices that positions are cut over; None where they are not.
    """

    cut: Cut
    tokens: int
    stream: int
    heads: int
    q: int
    kv: int
    keys: int
    ring: Ring | None

    @classmethod
    def of(cls, config: ByteConfig, rows: int, length: int, cut: Cut) -> "_Sizes":
        here = length // cut.context
        heads = config.num_attention_heads // cut.tensor
        kv_heads = config.kv_heads // (1 if config.kv_heads % cut.tensor else cut.tensor)
        stream = rows * here // (1 if rows % cut.tensor and here % cut.tensor else cut.tensor)
        H = config.head_size
        ring = Ring.of(config, rows, length, cut.context, cut.tensor, packed=cut.packed) if cut.context > 1 else None
        return cls(cut, rows * here, stream, heads, heads * H, kv_heads * H, length, ring)


@dataclass(frozen=True)
class _LayerBytes:
    """Of one layer: what it keeps with each value of ``remat``, and what it needs while it computes."""

    none: int
    dots: int
    full: int
    working: int = 0


def _dense_layer(config: ByteConfig, sizes: _Sizes) -> _LayerBytes:
    F, c = config.mlp_size // sizes.cut.tensor, jnp.dtype(config.compute_dtype).itemsize
    around = _around_the_mlp(config, sizes)
    inside = 3 if config.mlp_style == "gated" and config.hidden_act == "silu" else 4
    return _LayerBytes(
        around.none + sizes.tokens * c * inside * F,
        around.dots + sizes.tokens * c * 2 * F,
        around.full,
        around.working,
    )


def _layer_with_experts(config: ByteConfig, sizes: _Sizes) -> _LayerBytes:
    m, c, cut = config.moe, jnp.dtype(config.compute_dtype).itemsize, sizes.cut
    D, F, E = config.hidden_size, config.expert_size // cut.tensor, m.num_experts
    sent, around = expert_rows(config, sizes.tokens, cut.expert), _around_the_mlp(config, sizes)
    inside = 3 if config.hidden_act == "silu" else 4
    shared = m.n_shared_experts * F
    logits = E * (2 if m.noise == "noisy_topk" else 1)
    none = c * sent.rows * (2 * F if sent.by_kernels else 2 * D + inside * F) + sizes.tokens * c * inside * shared
    none += sizes.stream * _FLOAT32 * (D + E + logits)
    # Products of rows in bfloat16 are made again: ops.float32_product is no single product that jax could keep.
    are_parts = config.compute_dtype == "bfloat16" and sizes.tokens > FEW_ROWS
    by_parts = (m.gate == "linear") + (m.noise == "noisy_topk") if are_parts else 0
    dots = sizes.tokens * c * 2 * shared + sizes.stream * _FLOAT32 * (logits - E * by_parts)
    if m.gate == "context":
        C, inner = m.context_size, m.gate_intermediate_size or m.context_size
        features = D + C + max(1, C // 2) + (D if m.history_decay else 0)
        none += sizes.stream * _FLOAT32 * (3 * features + 5 * inner + C)
        dots += sizes.stream * _FLOAT32 * (features + 3 * inner + C)
    if cut.expert > 1 and m.dispatch == "dropless":
        none += c * D * sizes.tokens * cut.expert
    copies = 2 * c * sent.gathered * 2 * D * F
    if config.scan_unroll is None and config.remat in ("none", "weights"):  # XLA makes one copy for both passes
        none += c * sent.gathered * 3 * D * F
        copies //= 2
    if sent.by_kernels:  # its rows and their cotangents, of tokens and inside
        copies = c * sent.rows * (3 * D + 4 * F)
    return _LayerBytes(around.none + none, around.dots + dots, around.full, around.working + copies)


def _around_the_mlp(config: ByteConfig, sizes: _Sizes) -> _LayerBytes:
    D, c, q, kv = config.hidden_size, jnp.dtype(config.compute_dtype).itemsize, sizes.q, sizes.kv
    branches = 1 if config.parallel_residual else 2
    sums = branches + (config.residual_scaling == "deepnorm")  # of a stream, the layer's input among them
    stream, inside = branches * D, 2 * q + 2 * kv + branches * D  # norms are kept as products read them
    if config.layer_scale_init is not None:
        stream += 2 * D
    inside += (q + kv) * (config.qk_norm + config.xpos_learnable)
    scores = working = 0
    if sizes.ring is not None:
        working = sizes.ring.working
    elif not _is_fused(config):
        scores = sizes.tokens * sizes.heads * sizes.keys * (_FLOAT32 + c)
    elif sizes.cut.packed:
        inside += 2 * (q - kv)
    none = sizes.stream * c * stream + sizes.tokens * (c * inside + _FLOAT32 * sizes.heads) + scores
    dots = c * (sizes.stream * sums * D + sizes.tokens * (q + 2 * kv))
    return _LayerBytes(none, dots, sizes.stream * c * D, working)


def _is_fused(config: ByteConfig) -> bool:
    """Whether a GPU's kernel computes attention, so that scores never lie in memory."""
    return not (
        config.attention_logit_softcap or config.sink_tokens or config.attention_prune_below or config.attention_dropout
    )


class ExpertRows(NamedTuple):
    """What a layer with experts computes for some tokens.

    Attributes:
      rows: of all experts, with the empty ones that fill blocks or slots.
      gathered: blocks that get a copy of their expert's matrices; 0 where each expert has one.
      by_kernels: kernels compute them, and the backward pass has less of the forward one.
    """

    rows: int
    gathered: int
    by_kernels: bool = False


def _by_kernels(config: ByteConfig) -> bool:
    """Whether a Hopper GPU computes experts by kernels."""
    if config.moe.implementation != "auto":
        return config.moe.implementation == "pallas"
    sizes = config.hidden_size, config.expert_size
    supported = jnp.dtype(config.compute_dtype).itemsize == 2 and not any(size % 64 for size in sizes)
    return supported and "experts" not in config.lora.targets


def expert_rows(config: ByteConfig, tokens: int, devices: int = 1) -> ExpertRows:
    """Rows of the experts in a training step, as they are laid out for so many tokens of each device.

    Without a capacity each of the devices that share the experts computes all pairs of their tokens that are its own:
    a share where the loads are even, and as many such shares one after another as it gets.
    """
    m = config.moe
    if m.dispatch == "capacity":
        return ExpertRows(m.num_experts * m.slots(tokens), 0)
    experts_NK = jax.ShapeDtypeStruct((tokens * devices, m.num_experts_per_tok), jnp.int32)
    here = m.num_experts // devices
    if _by_kernels(config):
        layout = jax.eval_shape(lambda experts_NK: lay_out_unaligned(experts_NK, here), experts_NK)
        return ExpertRows(rows_of_share(layout, devices) or layout.pairs_S.shape[0], 0, by_kernels=True)
    each = block_rows(tokens * devices, m.num_experts_per_tok, m.num_experts)
    layout = jax.eval_shape(lambda experts_NK: lay_out(experts_NK, here, each), experts_NK)
    assert isinstance(layout.groups, Groups)
    if layout.groups.experts_G is None:
        return ExpertRows(layout.pairs_S.shape[0], 0)
    rows = rows_of_share(layout, devices) or layout.pairs_S.shape[0]
    return ExpertRows(rows, rows // each)

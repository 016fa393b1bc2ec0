"""Attention on a mesh: each device computes its rows and its heads, with kernels that XLA could not split.

B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from stellarbyte_jax.ops import attention as op
from stellarbyte_jax.ops.attention import AttentionOutput, Dropout, Mask
from stellarbyte_jax.ops.dispatch import dispatch
from stellarbyte_jax.ops.stored import Stored
from stellarbyte_jax.sharding.ring import AXIS, RINGS
from stellarbyte_jax.sharding.rules import RULES, current_mesh, entry_axes, of_device, spec_of

_HEADS = "tensor"


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    softcap: float | None = None,
    prune_below: float = 0.0,
    dropout: Dropout | None = None,
    return_weights: bool = False,
    implementation: str = "auto",
    required: bool = True,
    dealt: bool = False,
    stored: Stored | None = None,
) -> AttentionOutput:
    """:func:`ops.attention.attention` on the mesh that is set, without the log-sum-exp.

    Where ``tensor`` has more devices than there are key/value heads, several devices read the same one. Tokens that are
    ``dealt`` out by position (``ring.dealt_order``) stay so; others are gathered.

    Raises:
      NotImplementedError: dropout or pruning of the weights of tokens that are dealt out, or the implementation
        named does not support the arguments.
      ValueError: there is no such implementation for them.
    """
    options = {
        "softcap": softcap,
        "prune_below": prune_below,
        "return_weights": return_weights,
        "implementation": implementation,
        "required": required,
    }
    mesh = current_mesh()
    if mesh is None:
        return op.attention(q_BTNH, k_BSKH, v_BSKH, mask, dropout=dropout, stored=stored, **options)
    (rows,) = spec_of(("batch",), q_BTNH.shape[:1], mesh)
    if dealt:
        for name, asked in (("attention_dropout", dropout is not None), ("attention_prune_below", prune_below > 0)):
            if asked:
                raise NotImplementedError(f"{name} over rows that are split by position: set mesh.context=1")
    place = AXIS if dealt else None
    heads, kv_heads = _split_heads(q_BTNH.shape[2], k_BSKH.shape[2], mask, return_weights, mesh)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]

    if heads is not None and kv_heads is None:
        stored = None  # a device reads one of the heads that it has

    def local(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask, key: Array | None, stored: Stored | None) -> Any:
        if heads is not None and kv_heads is None and k_BSKH.shape[2] > 1:
            first = jax.lax.axis_index(_HEADS) * q_BTNH.shape[2] // group
            k_BSKH, v_BSKH = (jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k_BSKH, v_BSKH))
        if dealt:
            split = "attention over rows that are split by position"
            return dispatch(split, implementation, RINGS, q_BTNH, k_BSKH, v_BSKH, mask, softcap=softcap), None, None
        own = None
        if dropout is not None and key is not None:
            own = Dropout(dropout.rate, of_device(key, (*entry_axes(rows), *entry_axes(heads))))
        return tuple(op.attention(q_BTNH, k_BSKH, v_BSKH, mask, dropout=own, stored=stored, **options))

    queries, keys = PartitionSpec(rows, place, heads), PartitionSpec(rows, place, kv_heads)
    masks = jax.tree.map(lambda x: _of_mask(x, q_BTNH.shape[0], rows, place, k_BSKH.shape[2], kv_heads), mask)
    held = jax.tree.map(lambda x: _of_stored(x, rows, kv_heads), stored)
    made: Any = (queries, PartitionSpec(rows, kv_heads) if return_weights else None, None)
    # Kernels do not tell on which devices their results are equal.
    each = jax.shard_map(
        local, mesh=mesh, in_specs=(queries, keys, keys, masks, PartitionSpec(), held), out_specs=made, check_vma=False
    )
    return AttentionOutput(*each(q_BTNH, k_BSKH, v_BSKH, mask, None if dropout is None else dropout.key, stored))


def _split_heads(N: int, K: int, mask: Mask, whole_groups: bool, mesh: AbstractMesh) -> tuple[str | None, str | None]:
    """The mesh axis of query heads, and that of key/value heads; the latter stay whole where there are too few."""
    devices = mesh.shape.get(_HEADS, 1)
    if RULES.heads != (_HEADS,) or devices == 1 or N % devices:
        return None, None
    if K % devices == 0:
        return _HEADS, _HEADS
    by_head = mask.k_positions_BSK.shape[2] > 1
    if devices % K or whole_groups or by_head:
        return None, None
    return _HEADS, None


def _of_mask(x: Array, B: int, rows: object, place: str | None, K: int, kv_heads: str | None) -> PartitionSpec:
    first = rows if x.shape[0] == B and B > 1 else None
    per_head = x.ndim == 3 and x.shape[2] == K and K > 1
    return PartitionSpec(first, place, kv_heads) if per_head else PartitionSpec(first, place)


def _of_stored(x: Array, rows: object, kv_heads: str | None) -> PartitionSpec:
    """Of keys and values, of scales, of ends of rows, or of the number of a layer."""
    arrays = {5: PartitionSpec(None, rows, None, kv_heads), 4: PartitionSpec(None, rows, kv_heads)}
    return arrays.get(x.ndim, PartitionSpec(rows) if x.ndim else PartitionSpec())

"""Rows of a table that is split over a mesh.

B batch, T positions, V rows of the table, D model.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from stellarbyte_jax.sharding.rules import entry_axes, gather, spec_of, stream_axes


def look_up(
    table_VD: Float[Array, "V D"], rows_BT: Int[Array, "B T"], axes: tuple[str, str] = ("vocab", "embed")
) -> Float[Array, "B T D"]:
    """``table[rows]`` on the mesh that is set, which must be one; ``axes`` are the table's.

    With rows split over ``tensor``, each device gives those that it has and zeros for the others, and the sum over
    devices is the result (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).
    """
    mesh = jax.sharding.get_abstract_mesh()
    V, D = table_VD.shape
    tokens = spec_of(("batch", "sequence"), rows_BT.shape, mesh)
    between = spec_of((*stream_axes(rows_BT.shape[1]), None), (*rows_BT.shape, D), mesh)
    kept = PartitionSpec(spec_of(("vocab",), (V,), mesh)[0], None)
    (axis,) = entry_axes(kept[0]) or (None,)
    cut = next((at for at in (0, 1) if axis in entry_axes(between[at])), None)
    differ = entry_axes(tokens[0]) + entry_axes(tokens[1])

    def local(table_VD: Array, rows_BT: Array) -> Array:
        dtype = table_VD.dtype
        # Said here, or devices would add up gradients in float32.
        table_VD = jax.lax.pcast(table_VD, differ, to="varying")
        table_VD = table_VD.astype(jnp.float32)  # not for the rows, but for the sums of their gradients
        if axis is None:
            return jnp.take(table_VD, rows_BT, axis=0).astype(dtype)
        here = table_VD.shape[0]
        own_BT = rows_BT - here * jax.lax.axis_index(axis)
        has_BT1 = ((own_BT >= 0) & (own_BT < here))[:, :, None]
        found_BTD = jnp.where(has_BT1, jnp.take(table_VD, jnp.clip(own_BT, 0, here - 1), axis=0), 0).astype(dtype)
        if cut is not None:
            return jax.lax.psum_scatter(found_BTD, axis, scatter_dimension=cut, tiled=True)
        return jax.lax.psum(found_BTD, axis)

    made = PartitionSpec(*tokens, None) if cut is None else between
    return jax.shard_map(local, mesh=mesh, in_specs=(kept, tokens), out_specs=made)(gather(table_VD, axes), rows_BT)

"""Rows of a table that is split over a mesh.

B batch, T positions, V rows of the table, D model.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from stellarbyte_jax.sharding.rules import entry_axes, gather, spec_of


def look_up(table_VD: Float[Array, "V D"], rows_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """``table[rows]`` on the mesh that is set, which must be one.

    With rows split over ``tensor``, each device gives those that it has and zeros for the others, and the sum over
    devices is the result (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).
    """
    mesh = jax.sharding.get_abstract_mesh()
    V, D = table_VD.shape
    tokens = spec_of(("batch", "sequence"), rows_BT.shape, mesh)
    between = spec_of(("batch", "stream", None), (*rows_BT.shape, D), mesh)
    kept = PartitionSpec(spec_of(("vocab",), (V,), mesh)[0], None)
    (axis,) = entry_axes(kept[0]) or (None,)
    cuts_positions = axis in entry_axes(between[1])

    def local(table_VD: Array, rows_BT: Array) -> Array:
        if axis is None:
            return jnp.take(table_VD, rows_BT, axis=0)
        here = table_VD.shape[0]
        own_BT = rows_BT - here * jax.lax.axis_index(axis)
        has_BT1 = ((own_BT >= 0) & (own_BT < here))[:, :, None]
        found_BTD = jnp.where(has_BT1, jnp.take(table_VD, jnp.clip(own_BT, 0, here - 1), axis=0), 0)
        if cuts_positions:
            return jax.lax.psum_scatter(found_BTD, axis, scatter_dimension=1, tiled=True)
        return jax.lax.psum(found_BTD, axis)

    made = between if cuts_positions else PartitionSpec(*tokens, None)
    return jax.shard_map(local, mesh=mesh, in_specs=(kept, tokens), out_specs=made)(
        gather(table_VD, ("vocab", "embed")), rows_BT
    )

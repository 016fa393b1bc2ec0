"""The largest numbers of each row of an array that is split over a mesh along the other dimensions."""

from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from stellarbyte_jax.sharding.rules import current_mesh, spec_of


def top_k(x: Array, k: int, axes: Sequence[str]) -> tuple[Array, Array]:
    """``jax.lax.top_k`` along the last dimension, on the mesh that is set.

    Each device has rows of its own, which XLA would gather on all of them first.

    Args:
      x: [..., S], of any dtype that ``jax.lax.top_k`` takes.
      k: at most S.
      axes: logical axis of each dimension but the last.

    Returns:
      The values and int32 indices, [..., k] each.
    """

    def local(x: Array) -> tuple[Array, Array]:
        values, indices = jax.lax.top_k(x, k)
        return values, indices

    mesh = current_mesh()
    if mesh is None:
        return local(x)
    rows = PartitionSpec(*spec_of(axes, x.shape[:-1], mesh), None)
    return jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=(rows, rows))(x)

"""Weights on a mesh of devices: each goes straight into its parts, so that no device ever holds more than its own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses
from stellarbyte_jax.model.lazy import LazyArray, Leaf
from stellarbyte_jax.model.params import kept_spec
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.sharding import split_array


def place_weights(model: ByteTransformer, params: Params, mesh: Mesh) -> Params:
    """The weights split over a mesh as calls under ``jax.set_mesh(mesh)`` use them.

    They are placed one after another, arrays of numpy and lazy ones straight into their parts; of a lazy one, the host
    holds one layer at a time. A jax array of one device stays there besides.

    Args:
      model: the network.
      params: its weights: arrays of numpy or jax, or lazy ones.
      mesh: of ``sharding.make_mesh``; it may span several processes, which then all have to call this.
    """
    return jax.tree.map(_placed, params, weight_places(model, mesh))


def weight_places(model: ByteTransformer, mesh: Mesh) -> Params:
    """Where each weight lies on a mesh: a ``NamedSharding`` each."""
    return jax.tree.map(
        lambda use, shape: NamedSharding(mesh, kept_spec(use, shape.shape, mesh)),
        param_uses(model),
        param_shapes(model),
    )


def _placed(leaf: Leaf, place: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, place)
    if isinstance(leaf, np.ndarray):
        return split_array(leaf, place)
    first, *others = (*place.spec, None)
    if leaf.read_at is None or first is not None:
        return split_array(leaf.read(), place)
    return _by_layer(leaf, place, NamedSharding(place.mesh, PartitionSpec(*others[:-1])))


def _by_layer(leaf: LazyArray, place: NamedSharding, of_layer: NamedSharding) -> jax.Array:
    """Layer after layer: each is written into the parts of the whole where they lie."""
    assert leaf.read_at is not None
    write = jax.jit(_with_layer, donate_argnums=0, out_shardings=place)
    whole = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=place)()
    for layer in range(leaf.shape[0]):
        part = split_array(leaf.read_at(layer), of_layer)
        # Waited for: else the host reads on, and holds layers that devices have not taken yet.
        whole = jax.block_until_ready(write(whole, part, np.int32(layer)))
    return whole


def _with_layer(whole: Array, part: Array, layer: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, layer, axis=0)

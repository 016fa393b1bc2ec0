"""Weights on a mesh of devices."""

import jax
from jax.sharding import Mesh, NamedSharding

from stellarbyte_jax.model.decoder import ByteTransformer, param_uses
from stellarbyte_jax.model.params import kept_spec
from stellarbyte_jax.model.trees import Params


def place_weights(model: ByteTransformer, params: Params, mesh: Mesh) -> Params:
    """The weights split over a mesh as calls under ``jax.set_mesh(mesh)`` use them.

    Args:
      model: the network.
      params: its weights, on any device.
      mesh: of ``sharding.make_mesh``.
    """
    places = jax.tree.map(lambda use, x: NamedSharding(mesh, kept_spec(use, x.shape, mesh)), param_uses(model), params)
    return jax.device_put(params, places)

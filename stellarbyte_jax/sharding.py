"""Names of tensor dimensions, the mesh axes that they are split over, and how an activation is told so."""

from dataclasses import dataclass, fields

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array


@dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis; None: not split. Every axis of a weight or an activation is one of these fields.

    Attributes:
      layers: stacked layers of a group.
      vocab: vocabulary.
      embed: model width, of weights.
      heads: query heads.
      kv_heads: key and value heads.
      head_dim: channels of one head.
      rotary_pairs: pairs of channels that are rotated together.
      gate: gate and up projection, stacked.
      mlp: feed-forward width.
      experts: experts, of their weights.
      routed: experts, of what the router knows of them.
      gate_features: what the gate of a router reads besides the token.
      gate_inside: channels inside the gate of a router.
      positions: rows of a table of positions.
      batch: rows, of activations.
      sequence: positions, of activations.
      act_embed: model width, of activations, which need not be split as weights are.
    """

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    rotary_pairs: str | None = None
    gate: str | None = None
    mlp: str | None = "tensor"
    experts: str | None = "expert"
    routed: str | None = None
    gate_features: str | None = None
    gate_inside: str | None = None
    positions: str | None = None
    batch: str | None = "data"
    sequence: str | None = None
    act_embed: str | None = None


RULES = Rules()
ACTIVATION_AXES = ("batch", "sequence", "act_embed")
WEIGHT_AXES = tuple(field.name for field in fields(Rules) if field.name not in ACTIVATION_AXES)


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Splits an activation over the mesh that is set (``jax.set_mesh``), where it has the axes that the rules name.

    Args:
      x: any array.
      axes: logical axis of each dimension; None where the compiler may choose.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    named = [None if axis is None else getattr(RULES, axis) for axis in axes]
    spec = [name if name in mesh.axis_names else PartitionSpec.UNCONSTRAINED for name in named]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

"""Names of tensor dimensions, the mesh axes that they are split over, and how arrays are told so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from stellarbyte_jax.config.mesh import MeshConfig

AXES = MeshConfig.names()
MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis; (): not split. Every axis of a weight or an activation is one of these fields.

    ``RULES`` is of arrays in use; how weights are kept in between, :func:`kept_spec_of` tells.

    Of an array, a mesh axis splits the first dimension that may have it, and none that it does not divide.

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
      lora_rank: inner channels of adapters.
      batch: rows, of activations.
      sequence: positions, of activations inside a layer.
      stream_batch: rows, of activations between layers.
      stream: positions, likewise, where ``tensor`` does not divide the rows.
      act_embed: model width, of activations, which need not be split as weights are.
      slots: places of a cache for the tokens of a row.
    """

    layers: MeshAxes = ()
    vocab: MeshAxes = ("tensor",)
    embed: MeshAxes = ()
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    head_dim: MeshAxes = ()
    rotary_pairs: MeshAxes = ()
    gate: MeshAxes = ()
    mlp: MeshAxes = ("tensor",)
    experts: MeshAxes = ("expert",)
    routed: MeshAxes = ()
    gate_features: MeshAxes = ()
    gate_inside: MeshAxes = ()
    positions: MeshAxes = ()
    lora_rank: MeshAxes = ()
    batch: MeshAxes = ("data", "fsdp", "expert")
    sequence: MeshAxes = ("context",)
    stream_batch: MeshAxes = ("data", "fsdp", "expert", "tensor")
    stream: MeshAxes = ("context", "tensor")
    act_embed: MeshAxes = ()
    slots: MeshAxes = ()


RULES = Rules()
ACTIVATION_AXES = ("batch", "sequence", "stream_batch", "stream", "act_embed", "slots")
WEIGHT_AXES = tuple(field.name for field in fields(Rules) if field.name not in ACTIVATION_AXES)

# Of matrices and tables between their uses: these axes have parts of them, and nobody has the whole.
_PARTS = ("fsdp", "expert")
_KEPT = replace(RULES, embed=_PARTS)
_KEPT_FIRST = replace(_KEPT, vocab=_PARTS, heads=_PARTS, kv_heads=_PARTS, mlp=_PARTS)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these axes, on the first devices that there are, or on these.

    Args:
      sizes: of the axes, such as ``{"data": 2, "tensor": 4}``; those of ``AXES`` that are left out are 1.
      devices: to choose from; None: all.

    Raises:
      ValueError: there is no such axis, or there are too few devices.
    """
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise ValueError(f"a mesh has no axis {unknown[0]!r}; there are {', '.join(AXES)}")
    count, found = math.prod(sizes.values()), jax.devices() if devices is None else devices
    if count > len(found):
        raise ValueError(f"a mesh of {count} devices, and there are {len(found)}")
    sizes, chosen = {name: sizes.get(name, 1) for name in AXES}, found[:count]
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=chosen)


def current_mesh() -> AbstractMesh | None:
    """The mesh that is set, where it has axes that an array can be split over here; None otherwise.

    None inside of ``shard_map`` over all axes: arrays are those of one device there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [size for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    return mesh if math.prod(free) > 1 else None


def axis_size(axes: MeshAxes) -> int:
    """The number of parts that these axes of the mesh split a dimension into; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in axes)


def spec_of(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: AbstractMesh | Mesh,
    rules: Rules = RULES,
    unnamed: object = None,
) -> PartitionSpec:
    """How an array is split.

    Args:
      axes: logical axis of each dimension, or None.
      shape: of the array.
      mesh: whose axes there are.
      rules: mesh axes by logical axis.
      unnamed: entry of a dimension without a logical axis, or with one of which the mesh has no axis.
    """
    taken: set[str] = set()
    entries: list[object] = []
    manual = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual}
    for axis, size in zip(axes, shape, strict=True):
        ruled = () if axis is None else getattr(rules, axis)
        known = [name for name in ruled if name in mesh.axis_names and name not in manual]
        if axis is None or (ruled and not known):
            entries.append(unnamed)
            continue
        found = tuple(name for name in known if name not in taken and mesh.shape[name] > 1)
        while size % math.prod(mesh.shape[name] for name in found):
            found = found[:-1]
        taken.update(found)
        entries.append(found[0] if len(found) == 1 else found or None)
    return PartitionSpec(*entries)


def kept_spec_of(axes: Sequence[str | None], shape: Sequence[int], mesh: AbstractMesh | Mesh) -> PartitionSpec:
    """How a matrix or a table is kept: as it is used, and in parts besides.

    The parts are of the first dimension that can have them, so that they lie one after the other and none is put in
    order when they are gathered. Not of one that ``tensor`` splits: the compiler would rather exchange activations than
    sum gradients that are split twice.
    """
    return spec_of(axes, shape, mesh, _KEPT_FIRST if mesh.shape.get("tensor", 1) == 1 else _KEPT)


def stream_axes(positions: int) -> tuple[str, str]:
    """Logical axes of rows and of so many positions of activations between layers.

    Rows are split first: they lie one after the other, so that parts of several devices need not be put in order. One
    position, of a step of generation, stays where it is: a sum over devices takes one collective then.
    """
    return ("batch" if positions == 1 else "stream_batch"), "stream"


def entry_axes(entry: object) -> MeshAxes:
    """The mesh axes of an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (str(entry),)


def constrain(x: Array, axes: Sequence[str | None]) -> Array:
    """Splits an activation over the mesh that is set (``jax.set_mesh``), where it has the axes that the rules name.

    Args:
      x: any array.
      axes: logical axis of each dimension; None where the compiler may choose.
    """
    mesh = current_mesh()
    if mesh is None:
        for axis in filter(None, axes):
            getattr(RULES, axis)  # a wrong name is wrong on one device too
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(axes, x.shape, mesh, RULES, PartitionSpec.UNCONSTRAINED))


def enter(x: Array, inside: tuple[str | None, ...], between: tuple[str | None, ...]) -> Array:
    """Activations as a product reads them, split as ``inside`` says; their gradient is split as ``between`` says.

    So a layer gathers the tokens of its input once, and its gradient is summed and cut in one collective.
    """
    mesh = current_mesh()
    if mesh is None or spec_of(inside, x.shape, mesh) == spec_of(between, x.shape, mesh):
        return constrain(x, inside)
    return _enter(x, inside, between)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _enter(x: Array, inside: tuple[str | None, ...], between: tuple[str | None, ...]) -> Array:
    del between
    return constrain(x, inside)


def _enter_forward(x: Array, inside: tuple[str | None, ...], between: tuple[str | None, ...]) -> tuple[Array, None]:
    del between
    # By a primitive of its own: remat=weights makes the gathers of weights again, and not these.
    return checkpoint_name(constrain(x, inside), "entered"), None


def _enter_backward(
    inside: tuple[str | None, ...], between: tuple[str | None, ...], _: None, slope: Array
) -> tuple[Array]:
    del inside
    return (constrain(slope, between),)


_enter.defvjp(_enter_forward, _enter_backward)


def gather(weight: Array, axes: tuple[str, ...]) -> Array:
    """A weight as products use it: whole along the axes that it is only kept in parts along (``fsdp``).

    Its gradient is split as the weight is kept, so that a layer's gradients are summed and cut in one collective.
    """
    mesh = current_mesh()
    if mesh is None or kept_spec_of(axes, weight.shape, mesh) == spec_of(axes, weight.shape, mesh):
        return weight
    return _gather(weight, axes)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: Array, axes: tuple[str, ...]) -> Array:
    return _whole(weight, axes)


def _whole(weight: Array, axes: tuple[str, ...]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    # Said of the cast weight too, or the compiler keeps that one gathered for the backward pass.
    weight = jax.lax.with_sharding_constraint(weight, kept_spec_of(axes, weight.shape, mesh))
    return jax.lax.with_sharding_constraint(weight, spec_of(axes, weight.shape, mesh))


# Not by the function above: what is recomputed in the backward pass is chosen by the primitives here.
def _gather_forward(weight: Array, axes: tuple[str, ...]) -> tuple[Array, None]:
    return _whole(weight, axes), None


def _gather_backward(axes: tuple[str, ...], _: None, slope: Array) -> tuple[Array]:
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.lax.with_sharding_constraint(slope, kept_spec_of(axes, slope.shape, mesh)),)


_gather.defvjp(_gather_forward, _gather_backward)


def of_device(key: Array, axes: MeshAxes) -> Array:
    """Inside of ``shard_map``: a key of random numbers that differ along these mesh axes."""
    for axis in axes:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key

"""A layer of experts on a mesh: each device has some of the experts, and the tokens of its own rows.

B batch, T positions, D model, E experts, C slots of an expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from stellarbyte_jax.sharding.rules import MeshAxes, current_mesh, entry_axes, kept_spec_of, spec_of, stream_axes

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Exchange:
    """What devices that share the experts of a layer do with each other's tokens; without others, nothing.

    Attributes:
      devices: that experts are split over.
      axis: of the mesh.
      differ: whether each of them has tokens of its own.
    """

    devices: int = 1
    axis: str = "expert"
    differ: bool = False

    def own(self, experts: Array, count: int) -> Array:
        """Numbers of ``count`` experts as this device counts its own; how many these are for others and for none."""
        if self.devices == 1:
            return experts
        here = count // self.devices
        numbers = experts - here * jax.lax.axis_index(self.axis)
        return jnp.where((numbers >= 0) & (numbers < here) & (experts < count), numbers, here)

    def tokens(self, tree: Any) -> Any:
        """What all devices have of their tokens, on the first axis."""
        if not self.differ:
            return tree
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, tiled=True), tree)

    def sums(self, parts: Array) -> Array:
        """For the tokens that this device has, the sum of what devices made of all that :meth:`tokens` gave them."""
        if self.differ:
            return jax.lax.psum_scatter(parts, self.axis, scatter_dimension=0, tiled=True)
        return parts if self.devices == 1 else jax.lax.psum(parts, self.axis)

    def to_owners(self, x_ECD: Float[Array, "E C D"]) -> Float[Array, "e c D"]:
        """Slots of all experts to the devices that have the experts: each gets as many from every device."""
        if self.devices == 1:
            return x_ECD
        return jax.lax.all_to_all(x_ECD, self.axis, split_axis=0, concat_axis=1, tiled=True)

    def from_owners(self, y_ECD: Float[Array, "e c D"]) -> Float[Array, "E C D"]:
        """The way back."""
        if self.devices == 1:
            return y_ECD
        return jax.lax.all_to_all(y_ECD, self.axis, split_axis=1, concat_axis=0, tiled=True)


class Made(NamedTuple):
    """What a device makes of its tokens.

    Attributes:
      y_BTD: of its part of the experts' channels: devices add theirs up.
      tokens: a tree of arrays [B, T, ...].
      total: a tree of numbers, summed over the devices with different tokens.
    """

    y_BTD: Array
    tokens: Any
    total: Any


Local = Callable[[Array, Any, Any, Any, Exchange, MeshAxes], Made]


def on_devices(
    local: Local,
    x_BTD: Float[Array, "B T D"],
    tokens: Any,
    shared: Any,
    weights: Any,
    axes: Any,
) -> Made:
    """Calls ``local`` on each device of the mesh that is set, or once without one.

    Args:
      local: gets the arguments that follow as this device has them, how devices exchange tokens, and the mesh axes over
        which tokens differ.
      x_BTD: activations.
      tokens: tree of arrays [B, T, ...].
      shared: tree of arrays that all devices have whole.
      weights: tree of arrays as they are kept; ``local`` gets them whole but for experts and channels.
      axes: the same tree of the logical axes of each, of which the first has experts and their channels.
    """
    mesh = current_mesh()
    if mesh is None:
        return local(x_BTD, tokens, shared, weights, Exchange(), ())
    inside = spec_of(("batch", "sequence"), x_BTD.shape[:2], mesh)
    between = spec_of((*stream_axes(x_BTD.shape[1]), None), x_BTD.shape, mesh)
    leaves, structure = jax.tree.flatten(weights)
    named = list(zip(structure.flatten_up_to(axes), (leaf.shape for leaf in leaves), strict=True))
    kept = [kept_spec_of(names, shape, mesh) for names, shape in named]
    used = [spec_of(names, shape, mesh) for names, shape in named]
    of_experts = dict(zip(named[0][0], used[0], strict=True))
    differ = entry_axes(inside[0]) + entry_axes(inside[1])
    split = [(axis, at) for at in (0, 1) for axis in entry_axes(between[at]) if axis not in entry_axes(inside[at])]
    (owners,) = entry_axes(of_experts["experts"]) or (None,)
    exchange = Exchange() if owners is None else Exchange(mesh.shape[owners], owners, owners in differ)
    channels = entry_axes(of_experts["mlp"])

    def each(x_BTD: Array, tokens: Any, shared: Any, weights: list[Array]) -> tuple[Array, Any, Any]:
        for axis, at in split:
            x_BTD = jax.lax.all_gather(x_BTD, axis, axis=at, tiled=True)
        whole = [_gathered(w, *specs) for w, *specs in zip(weights, kept, used, strict=True)]
        made = local(x_BTD, tokens, shared, structure.unflatten(whole), exchange, differ)
        y_BTD = made.y_BTD
        for axis, at in split if channels else ():  # the same axis
            y_BTD = jax.lax.psum_scatter(y_BTD, axis, scatter_dimension=at, tiled=True)
        if channels and not split:
            y_BTD = jax.lax.psum(y_BTD, channels)
        return y_BTD, made.tokens, jax.lax.psum(made.total, differ)

    results = (between if channels else PartitionSpec(*inside, None), inside, PartitionSpec())
    # Sorting and the experts' own rules of differentiation do not tell on which devices their results are equal.
    run = jax.shard_map(
        each, mesh=mesh, in_specs=(between, inside, PartitionSpec(), kept), out_specs=results, check_vma=False
    )
    return Made(*run(x_BTD, tokens, shared, leaves))


def in_rows(tree: Tree, rows: tuple[int, ...]) -> Tree:
    """Arrays [B T, ...] as [B, T, ...]; ``rows`` are B and T."""
    return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), tree)


def flat(tree: Tree) -> Tree:
    """Arrays [B, T, ...] as [B T, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def by_token(function: Callable[[Any, Any], Any], rows: tuple[int, ...], tokens: Any, shared: Any) -> Any:
    """``function(tokens, shared)``, each device for its own tokens: for a top-k the compiler would gather all of them.

    Args:
      function: of trees; what it makes of a token does not depend on others.
      rows: B and T.
      tokens: tree of arrays [B T, ...].
      shared: tree of arrays that have no gradient.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(tokens, shared)
    between = spec_of(stream_axes(rows[1]), rows, mesh)

    def local(tokens: Any, shared: Any) -> Any:
        return in_rows(function(flat(tokens), shared), jax.tree.leaves(tokens)[0].shape[:2])

    run = jax.shard_map(local, mesh=mesh, in_specs=(between, PartitionSpec()), out_specs=between, check_vma=False)
    return flat(run(in_rows(tokens, rows), shared))


def _gathered(weight: Array, kept: PartitionSpec, used: PartitionSpec) -> Array:
    for at, (entry, whole) in enumerate(zip(kept, used, strict=True)):
        if cut := tuple(axis for axis in entry_axes(entry) if axis not in entry_axes(whole)):
            weight = jax.lax.all_gather(weight, cut, axis=at, tiled=True)
    return weight

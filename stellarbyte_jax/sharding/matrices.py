"""Functions of whole matrices, for arrays that a mesh cuts within their matrices.

Devices that have parts of the same matrices deal them out: each gets all parts of its share of them, computes these,
and sends the parts of the results back (as Liu et al. 2025, https://arxiv.org/abs/2502.16982, and Ahn et al. 2025,
https://arxiv.org/abs/2504.05295, do for Muon). So a device sends about what it keeps, and no array is whole on one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from stellarbyte_jax.sharding.rules import MeshAxes, current_mesh, entry_axes

# [N, I, O] to the same shape, each matrix on its own; zeros to zeros.
OfMatrices = Callable[[Array], Array]


class Dim(NamedTuple):
    """A dimension of a matrix.

    Attributes:
      size: of it.
      axes: of the mesh, that cut it.
      parts: that these cut it into.
    """

    size: int
    axes: MeshAxes
    parts: int


@dataclass(frozen=True)
class Stack:
    """Where the matrices of an array are, and how a mesh cuts it.

    Attributes:
      shape: of the whole array.
      rows: dimensions that are a matrix's rows.
      columns: those that are its columns. All others index matrices.
      spec: how the array is cut.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    spec: PartitionSpec

    def dims(self, numbers: Sequence[int], sizes: Mapping[str, int]) -> tuple[Dim, ...]:
        """These dimensions on a mesh of these sizes."""
        cut = [entry_axes(self.spec[i]) if i < len(self.spec) else () for i in numbers]
        parts = [math.prod(sizes[axis] for axis in axes) for axes in cut]
        return tuple(map(Dim, (self.shape[i] for i in numbers), cut, parts))

    def order(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """Dimensions that index matrices, those of the shorter side, and those of the longer one.

        So matrices are alike whichever way round they are kept.
        """

        def key(numbers: tuple[int, ...]) -> tuple[int, tuple[Dim, ...]]:
            return math.prod(self.shape[i] for i in numbers), self.dims(numbers, sizes)

        batch = tuple(i for i in range(len(self.shape)) if i not in (*self.rows, *self.columns))
        return (batch, *sorted((self.rows, self.columns), key=key))


@dataclass(frozen=True)
class Deal:
    """Stacks that are dealt out together.

    Attributes:
      members: their numbers.
      matrices: of which a device has a part.
      short: dimensions of a matrix's shorter side.
      long: of its longer one.
    """

    members: tuple[int, ...]
    matrices: int
    short: tuple[Dim, ...]
    long: tuple[Dim, ...]

    @property
    def axes(self) -> MeshAxes:
        """Of the mesh, that cut the matrices."""
        return tuple(axis for dim in (*self.short, *self.long) for axis in dim.axes)

    @property
    def devices(self) -> int:
        """Along these axes."""
        return math.prod(dim.parts for dim in (*self.short, *self.long))

    @property
    def each(self) -> int:
        """Matrices that a device gets whole; where devices do not divide them, some are zeros."""
        return -(-self.matrices // self.devices)

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of a part of a matrix."""
        return tuple(dim.size // dim.parts for dim in (*self.short, *self.long))

    @property
    def whole(self) -> tuple[int, int]:
        """Shape of a whole one."""
        rows, columns = (math.prod(dim.size for dim in dims) for dims in (self.short, self.long))
        return rows, columns

    @property
    def numbers(self) -> int:
        """In the whole matrices of a device."""
        return self.each * math.prod(self.whole)


def deals(stacks: Sequence[Stack], sizes: Mapping[str, int]) -> list[Deal]:
    """How stacks are dealt out on a mesh of these sizes.

    A stack whose matrices the devices divide goes alone, so that few are there at a time. Others go with those whose
    matrices are alike, so that fewer devices have nothing to do.
    """
    found: dict[object, Deal] = {}
    for number, stack in enumerate(stacks):
        batch, short, long = (stack.dims(numbers, sizes) for numbers in stack.order(sizes))
        one = Deal((number,), math.prod(dim.size // dim.parts for dim in batch), short, long)
        key = number if one.matrices % one.devices == 0 else (short, long)
        if key in found:
            one = dataclasses.replace(
                one,
                members=(*found[key].members, number),
                matrices=found[key].matrices + one.matrices,
            )
        found[key] = one
    return list(found.values())


def each_matrix(function: OfMatrices, arrays: Sequence[Array], stacks: Sequence[Stack]) -> list[Array]:
    """A function of each matrix of arrays on the mesh that is set, if any, cut as their stacks say.

    Args:
      function: must also be that of the transposed matrix, transposed.
      arrays: of one dtype.
      stacks: of each.
    """
    mesh = current_mesh()
    sizes = {} if mesh is None else mesh.shape
    results = list(arrays)
    for deal in deals(stacks, sizes):
        members = [stacks[i] for i in deal.members]
        run = partial(_on_device, function, deal, [stack.order(sizes) for stack in members], sizes)
        if mesh is not None:
            specs = tuple(stack.spec for stack in members)
            # What devices have in common they compute alike, which jax does not know of an exchange.
            run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
        for i, result in zip(deal.members, run(*(arrays[i] for i in deal.members)), strict=True):
            results[i] = result
    return results


def _on_device(
    function: OfMatrices,
    deal: Deal,
    orders: Sequence[tuple[tuple[int, ...], ...]],
    sizes: Mapping[str, int],
    *arrays: Array,
) -> tuple[Array, ...]:
    """Parts of a device, the dimensions of their stacks in these orders."""
    axes = [[i for dims in order for i in dims] for order in orders]
    moved = [x.transpose(order) for x, order in zip(arrays, axes, strict=True)]
    flat = [x.reshape(-1, *deal.part) for x in moved]
    parts = jnp.concatenate(flat) if len(flat) > 1 else flat[0]
    parts = _dealt(function, deal, sizes, parts)
    cuts = np.cumsum([len(x) for x in flat])[:-1]
    pieces = jnp.split(parts, cuts) if len(flat) > 1 else [parts]
    return tuple(
        piece.reshape(x.shape).transpose(np.argsort(order)) for piece, x, order in zip(pieces, moved, axes, strict=True)
    )


def _dealt(function: OfMatrices, deal: Deal, sizes: Mapping[str, int], parts: Array) -> Array:
    """Parts of results, from those of the matrices: [matrices, *part]."""
    axes, each = deal.axes, deal.each
    if not axes:
        return function(parts.reshape(each, *deal.whole)).reshape(parts.shape)
    padded = jnp.pad(parts, [(0, deal.devices * each - deal.matrices)] + [(0, 0)] * len(deal.part))
    got = _exchanged(padded, axes)
    got = got.reshape(*(sizes[axis] for axis in axes), each, *deal.part)
    # The devices along the axes that cut a dimension come before what each has of it.
    order = [len(axes)]
    for number, dim in enumerate((*deal.short, *deal.long)):
        order += [*(axes.index(axis) for axis in dim.axes), len(axes) + 1 + number]
    got = got.transpose(order)
    made = function(got.reshape(each, *deal.whole)).reshape(got.shape).transpose(np.argsort(order))
    return _exchanged(made.reshape(padded.shape), axes)[: deal.matrices]


def _exchanged(blocks: Array, axes: MeshAxes) -> Array:
    """Block j of each device goes to device j: of the first dimension, with the results in the order of devices."""
    # XLA gives the operands of one exchange different layouts, and refuses them, where there is more than one.
    return jax.lax.all_to_all(blocks.reshape(-1), axes, 0, 0, tiled=True).reshape(blocks.shape)

"""Which module of theirs an adapter of ours is of, and the arithmetic between the two.

PEFT has for a linear layer A [R, in] and B [out, R], and with DoRA a magnitude [out]; R is the rank. What is one tensor
there and several matrices here (fused projections, the experts of a layer) has one A and one B there: the matrices' own
below each other, and in blocks. So PEFT itself turns adapters of experts into those of fused ones.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.layout import interleaved_to_half
from stellarbyte_jax.hf.table import Entry, Family, Piece
from stellarbyte_jax.hf.tensors import flatten, shapes_of
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses
from stellarbyte_jax.model.lora import MAGNITUDE, A, B
from stellarbyte_jax.model.params import WeightUse

# By the last two names of a weight's path, what settings call it.
_TARGETS = {
    **{f"attn/{name}": name for name in ("q", "k", "v", "o")},
    **{f"mlp/{name}": name for name in ("gate_up", "down")},
    **{f"{block}/{name}": "experts" for block in ("experts", "pool") for name in ("gate_up", "down")},
    **{f"shared/{name}": "shared" for name in ("gate_up", "down")},
    "router/kernel": "router",
    "lm_head/kernel": "head",
    "embed/embedding": "embed",
}
_WEIGHT = ".weight"
PREFIX = "base_model.model."  # of names in the files
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def target_of(path: str) -> str | None:
    """What ``lora.target_modules`` calls the weight at a path; None: it has no adapter."""
    return _TARGETS.get("/".join(path.split("/")[-2:]))


class PeftFactors(NamedTuple):
    """The adapter of a matrix as PEFT has it.

    Attributes:
      a: [R, in].
      b: [out, R].
      magnitude: of DoRA [out]; None: it is none.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class Unit:
    """One matrix of a weight of ours.

    Attributes:
      path: of the weight.
      at: index or slice of the axes that have one.
      inputs: size of what it reads; of a table its rows.
      outputs: size of what it gives.
      rotary: whether the last axis is rotated in pairs.
    """

    path: str
    at: Mapping[str, int | slice]
    inputs: int
    outputs: int
    rotary: bool

    def index(self, use: WeightUse) -> tuple[int | slice, ...]:
        """Where it lies in the weight itself, or in a part of its adapter."""
        return tuple(self.at.get(axis, slice(None)) for axis in use.axes)


@dataclass(frozen=True)
class Module:
    """What PEFT has one A and one B for.

    Attributes:
      name: of the module in transformers.
      parameter: of the module, which PEFT adapts itself where that is no linear layer; None: it is one, or a table.
      target: what ``lora.target_modules`` calls its first matrix.
      groups: its matrices, joined along the outputs; a group for each expert, or one.
      is_table: whether rows of it are looked up.
    """

    name: str
    parameter: str | None
    target: str
    groups: tuple[tuple[Unit, ...], ...]
    is_table: bool

    @property
    def layer(self) -> int | None:
        """Its layer, from 0; None outside of layers."""
        return layer_of(self.name)

    @property
    def full_name(self) -> str:
        """With the parameter, where that is adapted itself."""
        return self.name if self.parameter is None else f"{self.name}.{self.parameter}"

    @property
    def inputs(self) -> int:
        """Columns of A."""
        return self.groups[0][0].inputs

    @property
    def outputs(self) -> int:
        """Rows of B."""
        return sum(unit.outputs for unit in self.groups[0])

    def joined(self, found: Iterable[PeftFactors]) -> PeftFactors:
        """One adapter of those of the matrices, in the order of :meth:`units`."""
        found = iter(found)
        experts = [_block(list(itertools.islice(found, len(group)))) for group in self.groups]
        if self.parameter is None or len(experts) == 1:
            return experts[0]
        a, b = (np.stack(parts) for parts in zip(*((each.a, each.b) for each in experts), strict=True))
        return PeftFactors(a.reshape(-1, self.inputs), b.transpose(1, 2, 0).reshape(self.outputs, -1))

    def split(self, whole: PeftFactors) -> list[tuple[Unit, PeftFactors]]:
        """The adapters of the matrices, without inner channels that are of other ones alone, nor those without any."""
        count = len(self.groups)
        a = whole.a.reshape(count, -1, self.inputs)
        b = whole.b.reshape(self.outputs, -1, count).transpose(2, 0, 1)
        joined = len(self.groups[0]) > 1 and b.any()
        found, start = [], 0
        for number, first in enumerate(self.groups[0]):
            rows = slice(start, start + first.outputs)
            start += first.outputs
            used = np.flatnonzero(b[:, rows].any(axis=(0, 1))) if joined else np.arange(a.shape[1])
            if not len(used) and whole.magnitude is None:
                continue
            magnitude = None if whole.magnitude is None else whole.magnitude[rows]
            for group, a_RI, b_OR in zip(self.groups, a, b, strict=True):
                found.append((group[number], PeftFactors(a_RI[used], b_OR[rows][:, used], magnitude)))
        return found

    def units(self) -> Iterator[Unit]:
        """All matrices, those of an expert after those of the one before."""
        return itertools.chain.from_iterable(self.groups)


def layer_of(name: str) -> int | None:
    """The layer that a module of theirs lies in; None: outside of layers."""
    found = re.search(r"\.layers\.(\d{1,9})\.", name)
    return None if found is None else int(found[1])


def _block(parts: list[PeftFactors]) -> PeftFactors:
    if len(parts) == 1:
        return parts[0]
    b = np.zeros((sum(len(part.b) for part in parts), sum(part.b.shape[1] for part in parts)), parts[0].b.dtype)
    row = column = 0
    for part in parts:
        rows, columns = part.b.shape
        b[row : row + rows, column : column + columns] = part.b
        row, column = row + rows, column + columns
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    return PeftFactors(
        np.concatenate([part.a for part in parts]), b, np.concatenate(magnitudes) if magnitudes else None
    )


@dataclass(frozen=True)
class Names:
    """The tensors of a base and its modules that may have adapters, by their names in transformers.

    Attributes:
      entries: every tensor.
      modules: those with adapters, by :attr:`Module.full_name`.
    """

    entries: Mapping[str, Entry]
    modules: Mapping[str, Module]


def names_of(family: Family, config: ByteConfig, *, listed: bool = False) -> Names:
    """What a base of a family consists of.

    Args:
      family: as it is written.
      config: of the base, without adapters.
      listed: whether each expert has tensors of its own, as in release 4 of transformers; else those of a layer are
        one, where the family has it so.
    """
    if family.fused and not listed:
        paths = {row.ours for row in family.fused}
        family = replace(family, rows=(*(row for row in family.rows if row.ours not in paths), *family.fused))
    model = ByteTransformer(config)
    shapes, uses = shapes_of(param_shapes(model)), flatten(param_uses(model))
    entries = {entry.theirs: entry for entry in family.entries(config, shapes)}
    modules = [_module(entry, shapes, uses) for entry in entries.values()]
    return Names(entries, {module.full_name: module for module in modules if module is not None})


def _module(entry: Entry, shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, WeightUse]) -> Module | None:
    target = target_of(entry.pieces[0].path)
    if target is None:
        return None
    groups: dict[int | slice, list[Unit]] = {}
    per_expert = not entry.theirs.endswith(_WEIGHT)
    for piece in entry.pieces:
        for unit in _units(piece, shapes[piece.path], uses[piece.path]):
            groups.setdefault(unit.at["experts"] if per_expert else 0, []).append(unit)
    name, _, parameter = entry.theirs.rpartition(".")
    is_parameter = per_expert or target == "router"
    joined = tuple(tuple(group) for group in groups.values())
    return Module(name, parameter if is_parameter else None, target, joined, uses[entry.pieces[0].path].lookup)


def _units(piece: Piece, shape: tuple[int, ...], use: WeightUse) -> Iterator[Unit]:
    index = (*piece.index, *(slice(None),) * (len(shape) - len(piece.index)))
    at = {axis: i for axis, i in zip(use.axes, index, strict=True) if i != slice(None)}
    free = [dim for dim in use.batch if use.axes[dim] not in at]
    sizes = [len(range(*i.indices(size))) if isinstance(i, slice) else 1 for i, size in zip(index, shape, strict=True)]
    inputs = (0,) if use.lookup else use.contracted
    outputs = [dim for dim in range(len(shape)) if dim not in (*use.batch, *inputs)]
    for place in itertools.product(*(range(shape[dim]) for dim in free)):
        own = at | {use.axes[dim]: i for dim, i in zip(free, place, strict=True)}
        yield Unit(
            piece.path, own, math.prod(sizes[d] for d in inputs), math.prod(sizes[d] for d in outputs), piece.row.rotary
        )


def factors_of(
    unit: Unit, leaves: Mapping[str, np.ndarray], uses: Mapping[str, WeightUse], reordered: bool
) -> PeftFactors | None:
    """The adapter of a matrix, from the leaves of a network by path; None: its weight has none.

    Args:
      unit: the matrix.
      leaves: adapters among them.
      uses: of the leaves.
      reordered: whether rotated pairs are reordered from (2i, 2i + 1) to (i, i + H/2).
    """
    if unit.path + A not in leaves:
        return None

    def part(suffix: str) -> np.ndarray:
        path = unit.path + suffix
        found = leaves[path][unit.index(uses[path])]
        return interleaved_to_half(found) if unit.rotary and reordered and suffix != A else found

    a, b = part(A), part(B)
    rank = a.shape[-1]
    magnitude = part(MAGNITUDE).reshape(-1) if unit.path + MAGNITUDE in leaves else None
    return PeftFactors(a.reshape(-1, rank).T, b.reshape(rank, -1).T, magnitude)


def put_factors(
    unit: Unit, found: PeftFactors, leaves: Mapping[str, np.ndarray], uses: Mapping[str, WeightUse]
) -> None:
    """Puts the adapter of a matrix into leaves of zeros, whose rank may be larger."""

    def part(suffix: str) -> np.ndarray:
        path = unit.path + suffix
        return leaves[path][unit.index(uses[path])]

    a, b = part(A), part(B)
    rank = len(found.a)
    a[..., :rank] = found.a.T.reshape(*a.shape[:-1], rank)
    b[:rank] = found.b.T.reshape(rank, *b.shape[1:])
    if found.magnitude is not None:
        magnitude = part(MAGNITUDE)
        magnitude[...] = found.magnitude.reshape(magnitude.shape)

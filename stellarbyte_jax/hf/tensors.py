"""From tensors of files to the leaves of a model: which ones there must be, and how they are read."""

import itertools
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.hf.layout import cast
from stellarbyte_jax.hf.spelling import Headers
from stellarbyte_jax.hf.table import Entry, Family, Piece
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.lazy import LazyArray
from stellarbyte_jax.model.placement import place_weights
from stellarbyte_jax.model.state.router import first_values, is_tracked
from stellarbyte_jax.sharding import device_mesh


class Tensors(Headers, Protocol):
    """Foreign tensors by name."""

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, whole."""
        ...


def table_entries(family: Family, model: ByteTransformer, where: str, overrides: Mapping[str, Any]) -> list[Entry]:
    """The tensors from which a model is read; every one of our leaves must be in some of them, or begin anew.

    Raises:
      ValueError: ``overrides`` ask for weights that the family does not have.
    """
    shapes = shapes_of(param_shapes(model))
    entries = list(family.entries(model.config, shapes))
    covered = {piece.path for entry in entries for piece in entry.pieces}
    foreign = sorted(path for path in set(shapes) - covered if not is_tracked(path))
    if foreign:
        raise ValueError(
            f"{where}: the settings ask for weights that {family.architecture} does not have: "
            f"{', '.join(foreign)}. Leave out the settings that make them ({', '.join(overrides)})"
        )
    return entries


def check_tensors(
    entries: list[Entry],
    tensors: Tensors,
    where: str,
    settings: str,
    *,
    buffers: tuple[str, ...] = (),
    tied: tuple[str, str] | None = None,
) -> None:
    """Every tensor of the table exists in its shape, and there is no other one.

    Args:
      entries: the table.
      tensors: what there is.
      where: names them in messages.
      settings: names what the table follows from.
      buffers: patterns of others that there may be.
      tied: names of embedding and head where they are one: the head may be there too, if it is equal.

    Raises:
      ValueError: it is otherwise.
    """
    wanted = {entry.theirs: entry.hf_shape for entry in entries}
    present = set(tensors.names())
    unknown = sorted(name for name in present - set(wanted) if not any(re.fullmatch(b, name) for b in buffers))
    if tied is not None and tied[1] in unknown and tied[0] in present:
        embedding, head = tied
        if not np.array_equal(tensors.read(head), tensors.read(embedding)):
            raise ValueError(
                f"{where}: tie_word_embeddings is true, but {head} differs from {embedding}. "
                f"Set tie_word_embeddings to false in {settings} to keep both"
            )
        unknown.remove(head)
    missing = [f"missing {name}" for name in wanted if name not in present]
    # In turn, so that a prefix of all names shows.
    pairs = itertools.zip_longest(missing, [f"unknown {name}" for name in unknown])
    problems = [problem for pair in pairs for problem in pair if problem is not None]
    problems += [
        f"{name} has shape {tensors.shape(name)}, the settings ask for {shape}"
        for name, shape in wanted.items()
        if name in present and tensors.shape(name) != shape
    ]
    _raise(problems, f"{where}: the tensors do not fit {settings}")


def read_params(entries: list[Entry], model: ByteTransformer, tensors: Tensors, dtype: np.dtype) -> dict[str, Any]:
    """:func:`lazy_params` as jax arrays, from tensors that were checked; where, says :func:`on_devices`."""
    return on_devices(model, lazy_params(entries, model, tensors, dtype))


def on_devices(model: ByteTransformer, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Lazy weights as jax arrays: split over the mesh that is set (``jax.set_mesh``), else on the default device."""
    mesh = device_mesh()
    if mesh is not None:
        return place_weights(model, dict(leaves), mesh)
    return jax.tree.map(lambda leaf: jax.device_put(leaf.read()), leaves)


def lazy_params(entries: list[Entry], model: ByteTransformer, tensors: Tensors, dtype: np.dtype) -> dict[str, Any]:
    """The parameter tree of arrays that are read when they are asked for.

    What files of every dtype have in float32 is float32 here too, such as biases that experts are chosen by. What
    routers keep from step to step begins anew where no tensor has it, in float32.
    """
    shapes = shapes_of(param_shapes(model))
    places: dict[str, list[Part]] = {}
    for entry in entries:
        for number, piece in enumerate(entry.pieces):
            places.setdefault(piece.path, []).append((entry, number))
    params: dict[str, Any] = {}
    for path, parts in places.items():
        shape, to = shapes[path], parts[0][0].dtype(dtype)
        read = partial(_read_leaf, parts, shape, tensors, to)
        layered = all(piece.index and isinstance(piece.index[0], int) for piece in map(_piece, parts))
        read_at = partial(_read_layer, parts, shape, tensors, to) if layered else None
        put_leaf(params, path, LazyArray(shape, to, read, read_at))
    for path in shapes.keys() - places.keys():
        first = first_values(model.config.moe.num_experts)[path.rpartition("/")[2]]
        to = np.dtype(np.float32)
        put_leaf(params, path, LazyArray(shapes[path], to, partial(np.full, shapes[path], first, to)))
    return params


Part = tuple[Entry, int]  # a tensor, and which of its pieces


def _piece(part: Part) -> Piece:
    entry, number = part
    return entry.pieces[number]


def _read_leaf(parts: list[Part], shape: tuple[int, ...], tensors: Tensors, dtype: np.dtype) -> np.ndarray:
    leaf = _aligned_zeros(shape, dtype)
    for part in parts:
        leaf[_piece(part).index] = _read_piece(part, tensors, dtype)
    return leaf


def _read_layer(parts: list[Part], shape: tuple[int, ...], tensors: Tensors, dtype: np.dtype, layer: int) -> np.ndarray:
    read = np.zeros(shape[1:], dtype)
    for part in parts:
        at, *index = _piece(part).index
        if at == layer:
            read[tuple(index)] = _read_piece(part, tensors, dtype)
    return read


def _read_piece(part: Part, tensors: Tensors, dtype: np.dtype) -> np.ndarray:
    entry, number = part
    piece = entry.pieces[number]
    theirs = cast(tensors.read(entry.theirs)[entry.rows_of(number)], dtype, entry.theirs)
    return piece.row.layout.from_hf(theirs, piece.shape)


def check_params(leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where leaves by path are not those of these shapes."""
    problems = [f"missing {path}" for path in shapes if path not in leaves]
    problems += [f"unknown {path}" for path in leaves if path not in shapes]
    problems += [
        f"{path} has shape {leaves[path].shape}, the settings ask for {shape}"
        for path, shape in shapes.items()
        if path in leaves and leaves[path].shape != shape
    ]
    _raise(problems, "the weights do not fit the model's settings")


def _raise(problems: list[str], summary: str) -> None:
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{summary}: {'; '.join(clipped(problem) for problem in problems[:8])}{more}")


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """On CPU jax takes over an array that starts at a multiple of 64 bytes, and copies any other one.

    Zeros, because the padding of the vocabulary stays as it is.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.zeros(nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + nbytes].view(dtype).reshape(shape)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by path, such as ``layers/0/attn/q``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def shapes_of(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of leaves by path."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def put_leaf(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf at its path into nested dicts."""
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf

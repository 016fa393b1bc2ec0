"""Checksums of arrays and JSON values, so that a bit that flips on a disk is found when a checkpoint is read."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.model.lazy import LazyArray, as_numpy

_PART, _SMALLEST = 2**24, 2**10  # elements of an array of numpy that are summed at once
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def array_checksums(tree: Any) -> dict[str, int]:
    """A number for each array of a tree, by its path, computed where the array lies; lazy ones are read in turn.

    The bits of element i and i itself, as unsigned integers, are mixed; the product of both, the latter made odd, is
    summed modulo 2^32. Any change of one element changes the sum, and a zeroed page of equal elements nearly surely.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    if any(isinstance(leaf, (np.ndarray, LazyArray)) for leaf in arrays):
        found = [_sum_of_numpy(as_numpy(leaf)) for leaf in arrays]
    else:
        found = jax.device_get(_sums(arrays))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: int(value) for name, value in zip(names, found, strict=True)}


def shared(array: Any) -> jax.Array:
    """An array of numpy as one of JAX on the CPU, which has the same memory where that is aligned."""
    if isinstance(array, jax.Array):
        return array
    return jax.device_put(array, jax.local_devices(backend="cpu")[0], may_alias=True)


def _sum_of_numpy(array: np.ndarray) -> int:
    """The sum in parts, of few lengths, since zeros behind a part add nothing.

    Of copies: JAX keeps what it is given until a later call, and a part that is a view keeps its whole array.
    """
    flat, total = array.reshape(-1), 0
    for at in range(0, flat.size, _PART):
        part = flat[at : at + _PART]
        length = min(_PART, max(_SMALLEST, 1 << (part.size - 1).bit_length()))
        part = np.concatenate([part, np.zeros(length - part.size, part.dtype)])
        total += int(_sum_of_part(part, np.uint32(at % 2**32)))
    return total % 2**32


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(jnp.asarray(leaf)) for leaf in leaves]


@jax.jit
def _sum_of_part(x: jax.Array, first: jax.Array) -> jax.Array:
    return _weighted(x, first + jnp.arange(x.size, dtype=jnp.uint32))


def _sum(x: jax.Array) -> jax.Array:
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return _weighted(x, index)


def _weighted(x: jax.Array, index: jax.Array) -> jax.Array:
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    return jnp.sum(_mixed(x.astype(jnp.uint32)) * (_mixed(index) | jnp.uint32(1)), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby, 2011, public domain): one to one, and each bit moves all."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def json_checksum(value: Any) -> str:
    """A hash of a JSON value, whatever the order of its names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differing(tree: Any, expected: Mapping[str, int]) -> list[str]:
    """Paths of the arrays whose checksum is another one, or that have none."""
    return [path for path, value in array_checksums(tree).items() if expected.get(path) != value]

"""Checksums of arrays, so that a bit that flips on a disk or on its way is found when the array is read.

The bits of element i in row-major order, as an unsigned integer, times ``2 i + 1``, are summed modulo 2^32: any change
of one element changes the sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_BLOCK = 1 << 16  # elements that numpy sums at once, so that nothing as large as the array is made


def array_checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of a tree, by its path, computed where the array lies."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    found = {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}
    on_host = {n: x for n, x in found.items() if isinstance(x, np.ndarray) and x.dtype.itemsize in _UNSIGNED}
    others = [name for name in names if name not in on_host]
    sums = dict(zip(others, jax.device_get(_sums([found[name] for name in others])), strict=True)) if others else {}
    return {name: array_checksum(on_host[name]) if name in on_host else int(sums[name]) for name in names}


def array_checksum(array: np.ndarray) -> int:
    """The checksum of an array of the host. Elements of 8 bytes count as two of 4."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{min(array.dtype.itemsize, 4)}")
    weights = 2 * np.arange(min(bits.size, _BLOCK), dtype=np.uint32) + np.uint32(1)
    total = 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK].astype(np.uint32)
        total += int(np.dot(block, weights[: block.size])) + 2 * start * int(block.sum(dtype=np.uint64))
    return total % 2**32


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(jnp.asarray(leaf)) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(x.astype(jnp.uint32) * (index * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)

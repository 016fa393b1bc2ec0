"""Arrays between hosts and the devices of a mesh, which may be those of several processes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stellarbyte_jax.sharding.rules import entry_axes

Index = tuple[int | slice, ...]


def device_mesh() -> Mesh | None:
    """The mesh of ``jax.set_mesh``, with its devices; None without one, and where it is of one device."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def split_array(array: np.ndarray, place: NamedSharding) -> jax.Array:
    """An array that every process has, in parts: each puts what its devices hold, and nothing else, on them.

    Nothing of the array is in use when this returns.
    """
    devices = place.addressable_devices_indices_map(array.shape)
    parts = [jax.device_put(array[index], device) for device, index in devices.items()]
    made = jax.make_array_from_single_device_arrays(array.shape, place, parts)
    if next(iter(devices)).platform == "cpu":  # where jax takes memory of numpy over
        made = jax.jit(jnp.copy, out_shardings=place)(made)
    return jax.block_until_ready(made)


def on_host(tree: Any) -> Any:
    """The arrays of a tree, whole and of numpy. Where one lies in parts on several processes, all have to call it."""
    return jax.tree.map(_on_host, tree)


def _on_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def part_on_host(array: Any, index: Index) -> np.ndarray:
    """``array[index]``, of numpy, cut before it leaves its devices.

    Of an array that lies in parts, the result, and no more, is in the memory of each device for a moment. Where these
    are devices of several processes, all have to call this or :func:`give_part`, in the same order.

    Args:
      array: of numpy or jax.
      index: whole numbers, and slices without a step.
    """
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding) and array.sharding.mesh.size > 1:
        return np.asarray(_gathered(array, index, array.sharding).addressable_data(0))
    return np.asarray(array[index])


def give_part(array: Any, index: Index) -> None:
    """Takes part in the :func:`part_on_host` of another process, and keeps nothing."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)
        jax.block_until_ready(_gathered(array, index, array.sharding))


def _gathered(array: jax.Array, index: Index, place: NamedSharding) -> jax.Array:
    """The part, whole on each device."""
    numbers = [np.int32(i) if isinstance(i, int) else None for i in index]
    slices = tuple(None if isinstance(i, int) else (i.start, i.stop) for i in index)
    return _cut(array, numbers, slices, place)


@functools.partial(jax.jit, static_argnames=("slices", "place"))
def _cut(
    array: jax.Array, numbers: list[Any], slices: tuple[tuple[int, int] | None, ...], place: NamedSharding
) -> jax.Array:
    spec = [*place.spec, *(None,) * (array.ndim - len(place.spec))]
    part = array
    for d in sorted(range(len(slices)), key=lambda d: bool(entry_axes(spec[d]))):
        if (cut := slices[d]) is not None:
            first, end, _ = slice(*cut).indices(part.shape[d])
            if (first, end) != (0, part.shape[d]):
                part, spec[d] = jax.lax.slice_in_dim(part, first, end, axis=d), None
        elif not entry_axes(spec[d]):
            part = jax.lax.dynamic_index_in_dim(part, numbers[d], axis=d)
        else:
            part, spec[d] = _one_of_split(part, numbers[d], d), None
        # First cut, then gathered: else the compiler may do it in the other order.
        part = jax.lax.with_sharding_constraint(part, NamedSharding(place.mesh, PartitionSpec(*spec)))
    part = jax.lax.with_sharding_constraint(part, NamedSharding(place.mesh, PartitionSpec()))
    return jax.lax.squeeze(part, [d for d, number in enumerate(numbers) if number is not None])


def _one_of_split(x: jax.Array, number: jax.Array, d: int) -> jax.Array:
    """``x[number]`` along a dimension that is split, as a sum: a cut at a variable place would gather all of it.

    Of bits, since -0.0 + 0 is 0.
    """
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    is_it = jax.lax.broadcasted_iota(jnp.int32, x.shape, d) == number
    one = jnp.sum(jnp.where(is_it, bits, jnp.zeros((), unsigned)), axis=d, keepdims=True, dtype=unsigned)
    return jax.lax.bitcast_convert_type(one, x.dtype)

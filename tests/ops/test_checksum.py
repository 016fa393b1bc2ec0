"""Checksums of arrays: a flipped bit is found in every dtype, and the host sums as the device does."""

import tracemalloc
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.checksum import array_checksum, array_checksums


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "float16", "uint8"])
def test_every_bit_counts(dtype: str) -> None:
    random = np.random.default_rng(0)
    array = random.integers(0, 256, (3, 5, 7 * jnp.dtype(dtype).itemsize), np.uint8).view(jnp.dtype(dtype))
    tree = {"a": {"b": array}, "c": np.ones(2, np.float32)}
    plain = array_checksums(tree)
    assert plain.keys() == {"a/b", "c"} and array_checksums(on_device(tree)) == plain
    assert array_checksums({"a": on_device(tree["a"]), "c": tree["c"]}) == plain
    for _ in range(50):
        changed = array.copy()
        place = tuple(random.integers(0, n) for n in changed.view(np.uint8).shape)
        changed.view(np.uint8)[place] ^= 1 << random.integers(8)
        for each in (changed, jnp.asarray(changed)):
            found = array_checksums({"a": {"b": each}, "c": tree["c"]})
            assert found["a/b"] != plain["a/b"] and found["c"] == plain["c"]
    swapped = array.copy()
    swapped[0, 0, 0], swapped[0, 0, 1] = array[0, 0, 1], array[0, 0, 0]
    assert array_checksums({"x": swapped}) != array_checksums({"x": array})


def test_the_number_of_an_array_is_the_sum_of_its_weighted_bits() -> None:
    array = np.asarray([1.5, -2.0, 0.0], np.float32)
    bits = array.view(np.uint32).astype(object)
    expected = (bits[0] * 1 + bits[1] * 3 + bits[2] * 5) % 2**32
    assert array_checksums({"x": array}) == array_checksums({"x": jnp.asarray(array)}) == {"x": expected}


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (65_536,), (65_537,), (300, 700)])
def test_the_host_sums_as_the_device_does(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype("f4")
    with warnings.catch_warnings(action="error"):  # numpy warns of sums that wrap unexpectedly
        assert {"x": array_checksum(array)} == array_checksums({"x": jnp.asarray(array)})
    assert array_checksum(np.asarray(array.T)) == array_checksums({"x": jnp.asarray(array.T)})["x"]


def test_flags_and_wide_numbers() -> None:
    flags = np.asarray([True, False, True])
    assert array_checksums({"x": flags}) == array_checksums({"x": jnp.asarray(flags)}) == {"x": 1 + 5}
    wide = np.asarray([1e300, -3.0])
    assert array_checksum(wide) == array_checksum(wide.view("u4"))


def test_the_host_holds_nothing_as_large_as_the_array() -> None:
    array = np.ones(4_000_000, "f4")
    tracemalloc.start()
    array_checksum(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 8

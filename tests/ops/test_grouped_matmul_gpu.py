"""The grouped product's kernels on a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grouped import NAMES, assert_rounded, drawn, exact, loads, poisoned, with_gradients
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)

from stellarbyte_jax.ops.grouped_matmul import Groups
from stellarbyte_jax.ops.grouped_matmul import grouped_matmul as by_name
from stellarbyte_jax.ops.pallas.grouped_matmul import grouped_matmul

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups"), [(1000, 192, 320, 8), (64, 64, 64, 3), (2056, 512, 1408, 16)]
)
def test_the_product_and_its_gradients(rows, inputs, outputs, groups):
    run = jax.jit(with_gradients(grouped_matmul))
    x, w, dy = drawn(rows, inputs, outputs, groups)
    cases = loads(groups, rows) | {f"drawn {seed}": loads(groups, rows, seed)["anywhere"] for seed in range(1, 20)}
    for load, sizes in cases.items():
        x_bad, dy_bad = poisoned(sizes, x, dy)
        for name, ours, right in zip(
            NAMES,
            run(x_bad, w, dy_bad, jax.device_put(np.asarray(sizes, np.int32))),
            exact(x, w, dy, sizes),
            strict=True,
        ):
            assert_rounded(ours, right, f"{name}, {load}")


@pytest.mark.parametrize("load", ["even", "one group has half", "tiny", "anywhere"])
def test_every_run_gives_the_same_bits(load):
    run = jax.jit(with_gradients(grouped_matmul))
    arrays = drawn(16384, 1024, 1024, 64)
    sizes = jnp.asarray(loads(64, 16384)[load], jnp.int32)
    first = jax.device_get(run(*arrays, sizes))
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(run(*arrays, sizes)), first)


@pytest.mark.parametrize("inputs", [64, 512])
def test_whole_tiles_beside_some_that_are_cut(inputs):
    """Groups of fewer rows than a window and of more, in many tiles for each warpgroup of a block, and rows behind."""
    sizes = np.asarray([40, 200, 63, 1, 64, 129] * 24, np.int32)
    rows = int(sizes.sum()) // 8 * 8 + 48
    x, w, dy = drawn(rows, inputs, 1408, len(sizes))
    x_bad, dy_bad = poisoned(sizes, x, dy)
    given = x_bad, w, dy_bad, jax.device_put(sizes)
    run = jax.jit(with_gradients(grouped_matmul))
    first = jax.device_get(run(*given))
    for name, ours, right in zip(NAMES, first, exact(x, w, dy, sizes), strict=True):
        assert_rounded(ours, right, name)
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(run(*given)), first)


def test_blocks_of_the_model_through_the_kernels():
    x, w, _ = drawn(512, 128, 192, 4)
    groups = Groups(
        jax.device_put(np.asarray([256, 0, 128, 128], np.int32)), jax.device_put(np.asarray([0, 0, 2, 3], np.int32))
    )
    ours, xla = (jax.jit(lambda x, w, n=n: by_name(x, w, groups, implementation=n)) for n in ("pallas", "xla"))
    assert "grouped_matmul" in ours.lower(x, w).compile().as_text()
    np.testing.assert_allclose(*(np.asarray(f(x, w), np.float32) for f in (ours, xla)), rtol=2**-7, atol=0.1)

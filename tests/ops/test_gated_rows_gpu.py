"""Products with a gate between them on a Hopper GPU."""

import jax
import numpy as np
import pytest
from helpers.grouped import drawn, poisoned
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)
from ops.test_gated_rows import assert_gated, exact, with_both

from stellarbyte_jax.ops.activations import ACTIVATIONS
from stellarbyte_jax.ops.pallas.gated_rows import gated_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("activation", "rows", "inputs", "columns", "sizes"),
    [
        *((name, 4096, 1024, 512, [700, 0, 1, 2000, 63, 1000, 332, 0]) for name in ACTIVATIONS),
        ("silu", 1000, 192, 320, [5, 900, 90]),
        ("silu", 64, 64, 64, [0, 64]),
        ("silu", 2048, 2048, 1408, [300, 1748]),
    ],
)
def test_gated_rows(activation, rows, inputs, columns, sizes):
    x, w, _ = drawn(rows, inputs, 2 * columns, len(sizes))
    (x_bad,) = poisoned(sizes, x)
    run = jax.jit(lambda *given: with_both(activation, *given))
    given = x_bad, w, jax.device_put(np.asarray(sizes, np.int32))
    first = run(*given)
    assert_gated(first, *exact(activation, x, w, sizes))
    for _ in range(3):
        for again, before in zip(run(*given), first, strict=True):
            np.testing.assert_array_equal(again, before)
    np.testing.assert_array_equal(gated_rows(activation, *given), first[0])

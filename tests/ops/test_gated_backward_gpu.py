"""The backward pass of gated rows on a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)
from ops.test_gated_backward import assert_right, drawn, exact

from stellarbyte_jax.ops.activations import ACTIVATIONS
from stellarbyte_jax.ops.pallas.gated_backward import gated_backward

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("activation", "rows", "channels", "dtype"),
    [
        *((name, 40_008, 512, jnp.bfloat16) for name in ACTIVATIONS),
        ("silu", 1000, 1408, jnp.float16),
        ("silu", 8, 64, jnp.bfloat16),
    ],
)
def test_gated_rows(activation, rows, channels, dtype):
    given = drawn(rows, channels, dtype)
    run = jax.jit(lambda *x: gated_backward(activation, *x))
    first = run(*given)
    assert_right(first, exact(activation, *given))
    for _ in range(3):
        for again, before in zip(run(*given), first, strict=True):
            np.testing.assert_array_equal(again, before)

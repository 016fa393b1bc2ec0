"""Products of float32 from parts in bfloat16, on a GPU's tensor cores."""

import jax
import numpy as np
import pytest
from ops.test_float32_product import assert_near, drawn

from stellarbyte_jax.ops.float32_product import float32_product

pytestmark = pytest.mark.gpu


def test_values_and_gradients_are_those_of_float32():
    x, w, dy = drawn(4096, 1024, 64)

    def run(x, w, dy):
        y, pull = jax.vjp(float32_product, x, w)
        return y, *pull(dy)

    y, dx, dw = jax.jit(run)(x, w, dy)
    # Tensor cores cut what they add instead of rounding it.
    assert_near(y, (x, w), 4e-6)
    assert_near(dw, (np.asarray(x).T, dy), 4e-6)
    assert_near(dx, (dy, np.asarray(w).T), 2**-8)

"""Products of float32 from parts in bfloat16, beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.float32_product import float32_product


def drawn(rows=37, inputs=96, outputs=24):
    random = np.random.default_rng(0)
    x = jax.device_put(np.asarray(random.standard_normal((rows, inputs)), jnp.bfloat16))
    # Sizes that differ by much more than the bits of one part.
    w, dy = (
        jax.device_put(
            np.asarray(random.standard_normal(shape) * np.exp(3 * random.standard_normal(shape)), np.float32)
        )
        for shape in ((inputs, outputs), (rows, outputs))
    )
    return x, w, dy


def assert_near(found, factors, bound):
    """Within ``bound`` of what the terms of each sum have as their sizes."""
    right, sizes = (np.matmul(*(f(np.asarray(x, np.float64)) for x in factors)) for f in (np.asarray, np.abs))
    assert np.max(np.abs(np.asarray(found, np.float64) - right) / sizes) < bound


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_float32(compiled):
    x, w, dy = drawn()

    def run(x, w, dy):
        y, pull = jax.vjp(float32_product, x, w)
        return y, *pull(dy)

    y, dx, dw = (jax.jit(run) if compiled else run)(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_near(y, (x, w), 1e-6)
    assert_near(dw, (np.asarray(x).T, dy), 1e-6)
    assert_near(dx, (dy, np.asarray(w).T), 2**-8)


def test_the_gradient_of_rows_has_sixteen_bits_before_it_is_rounded():
    """Of a sum whose large terms cancel each other."""
    x = jnp.ones((1, 1), jnp.bfloat16)
    w = jax.device_put(np.asarray([[1 + 2**-12, -1]], np.float32))
    dx = jax.grad(lambda x: jnp.sum(float32_product(x, w)))(x)
    np.testing.assert_array_equal(np.asarray(dx, np.float32), [[2**-12]])


def test_rows_of_several_axes():
    x, w, _ = drawn()
    found = float32_product(x.reshape(37, 1, 96), w)
    np.testing.assert_array_equal(found[:, 0], float32_product(x, w))


def test_other_dtypes_are_refused():
    x, w, _ = drawn()
    with pytest.raises(ValueError, match="the factors must be bfloat16 and float32, not float32 and float32"):
        float32_product(x.astype(jnp.float32), w)
    with pytest.raises(ValueError, match="not bfloat16 and bfloat16"):
        float32_product(x, w.astype(jnp.bfloat16))

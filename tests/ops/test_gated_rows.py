"""Products with a gate between them as one kernel, without a GPU: interpreted, and compiled as far as a CPU can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.grouped import assert_rounded, drawn, poisoned

from stellarbyte_jax.ops.activations import ACTIVATIONS, value_and_slope
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.gated_products import gated_products, unwoven, woven
from stellarbyte_jax.ops.pallas.gated_products import refusal as refusal_of_products
from stellarbyte_jax.ops.pallas.gated_rows import gated_rows, refusal

# A window that is moved back, an empty group, small ones, one with both ends in the same 64 rows, and rows behind.
ROWS, SIZES = 144, [90, 0, 30, 7]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)


def exact(activation, x, w, sizes):
    """Both products, and the gated rows of these as they are rounded; float64."""
    groups, rows = np.repeat(np.arange(len(sizes)), sizes), sum(sizes)
    both = np.zeros((len(x), w.shape[2]))
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    for group in range(len(sizes)):
        both[:rows][groups == group] = x[:rows][groups == group] @ w[group]
    rounded = np.asarray(jax.device_put(np.asarray(both, jnp.bfloat16)), np.float32)
    F = w.shape[2] // 2
    return both, np.asarray(ACTIVATIONS[activation](rounded[:, :F]) * rounded[:, F:])


def with_both(activation, x, w, sizes):
    """Gated rows and both products, side by side."""
    h, both = gated_products(activation, x, woven(w), sizes)
    return h, unwoven(both)


def assert_gated(found, both, right):
    """The products may be rounded the other way."""
    assert_rounded(found[1], both, "both products")
    np.testing.assert_allclose(np.asarray(found[0], np.float64), right, rtol=3 * 2**-8, atol=0.01 * np.abs(both).max())


@pytest.mark.parametrize("case", mostly_slow([(name, n) for name in ACTIVATIONS for n in (64, 192)], ("silu", 192)))
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # rows that nobody reads
def test_gated_rows_in_the_interpreter(case):
    activation, columns = case
    x, w, _ = drawn(ROWS, 128, 2 * columns, len(SIZES))
    (x_bad,) = poisoned(SIZES, x)
    sizes = jax.device_put(np.asarray(SIZES, np.int32))
    with compat.interpreted():
        found = jax.jit(lambda x, w, s: with_both(activation, x, w, s))(x_bad, w, sizes)
        alone = gated_rows(activation, x_bad, w, sizes)
        assert_gated(found, *exact(activation, x, w, SIZES))
    # Of the products as they are rounded, which the backward pass has: but for last bits, and of next to none.
    gate, up = jnp.split(found[1].astype(jnp.float32), 2, axis=1)
    of_rounded = (value_and_slope(activation, gate)[0] * up).astype(jnp.bfloat16)
    assert np.mean(np.asarray(found[0] != of_rounded)[np.asarray(gate) > -2]) < 0.05
    np.testing.assert_array_equal(alone, found[0])


@pytest.mark.parametrize("kernel", [gated_rows, gated_products])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_can_be_lowered_for_a_gpu(hopper, activation, kernel):
    shapes = ((1000, 1024), jnp.bfloat16), ((3, 1024, 640), jnp.bfloat16), ((3,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*each) for each in shapes]
    run = jax.jit(lambda *x: kernel(activation, *x))
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1 and f"{kernel.__name__}_mosaic_gpu" in text


def test_weaving():
    x = np.arange(2 * 3 * 256, dtype=np.float32).reshape(2, 3, 256)
    found = np.asarray(woven(jnp.asarray(x)))
    np.testing.assert_array_equal(found[..., :64], x[..., :64])
    np.testing.assert_array_equal(found[..., 64:128], x[..., 128:192])
    np.testing.assert_array_equal(found[..., 128:192], x[..., 64:128])
    np.testing.assert_array_equal(unwoven(woven(jnp.asarray(x))), x)


def test_what_the_kernel_refuses(hopper):
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    found = refusal(x, jax.ShapeDtypeStruct((2, 64, 192), jnp.bfloat16))
    assert found == "each product must have a multiple of 64 columns, not 96"
    with pytest.raises(NotImplementedError, match="there must be at least 64 rows, not 8"):
        gated_rows(
            "silu",
            jnp.ones((8, 64), jnp.bfloat16),
            jnp.ones((2, 64, 128), jnp.bfloat16),
            jnp.ones(2, jnp.int32),
        )
    with pytest.raises(NotImplementedError, match="each product must have a multiple of 64 columns, not 32"):
        gated_products(
            "silu", jnp.ones((64, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16), jnp.ones(2, jnp.int32)
        )
    assert refusal_of_products(x, jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16)) is None


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not look for races")
def test_warpgroups_wait_for_each_other():
    x, w, _ = drawn(216, 128, 384, 4)
    with compat.interpreted(detect_races=True):
        found = with_both("silu", x, w, jax.device_put(np.asarray([64, 128, 0, 22], np.int32)))
    assert_gated(found, *exact("silu", x, w, [64, 128, 0, 22]))

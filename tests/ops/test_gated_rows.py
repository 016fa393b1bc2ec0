"""Products with a gate between them as one kernel, without a GPU: interpreted, and compiled as far as a CPU can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.grouped import assert_rounded, drawn, poisoned

from stellarbyte_jax.ops.activations import ACTIVATIONS, value_and_slope
from stellarbyte_jax.ops.pallas import compat
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
        found = jax.jit(lambda *given: gated_rows(activation, *given, keep=True))(x_bad, w, sizes)
        alone, none = gated_rows(activation, x_bad, w, sizes, keep=False)
        assert_gated(found, *exact(activation, x, w, SIZES))
    # Of the products as they are rounded, which the backward pass has: but for last bits, and of next to none.
    gate, up = jnp.split(found[1].astype(jnp.float32), 2, axis=1)
    of_rounded = (value_and_slope(activation, gate)[0] * up).astype(jnp.bfloat16)
    assert np.mean(np.asarray(found[0] != of_rounded)[np.asarray(gate) > -2]) < 0.05
    assert none is None
    np.testing.assert_array_equal(alone, found[0])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernel_can_be_lowered_for_a_gpu(hopper, activation, keep):
    shapes = ((1000, 1024), jnp.bfloat16), ((3, 1024, 640), jnp.bfloat16), ((3,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*each) for each in shapes]
    run = jax.jit(lambda *x: gated_rows(activation, *x, keep=keep))
    assert "gated_rows_mosaic_gpu" in run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


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
            keep=True,
        )

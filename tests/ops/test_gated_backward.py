"""The backward pass of gated rows as a kernel, without a GPU: interpreted, and compiled for one as far as a CPU can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow

from stellarbyte_jax.ops.activations import ACTIVATIONS, value_and_slope
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.gated_backward import gated_backward, refusal
from stellarbyte_jax.ops.pallas.gated_products import unwoven, woven

# In the interpreter of jax 0.10 a copy that reaches behind an array writes nothing.
TAIL = 1000 if jax.__version_info__ >= (0, 11) else 960  # several tiles for each of nine warpgroups


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)


def drawn(rows, channels, dtype=jnp.bfloat16):
    random = np.random.default_rng(0)
    both, dh = (jnp.asarray(random.standard_normal((rows, n)), dtype) for n in (2 * channels, channels))
    weights = random.random(rows)
    weights[::7] = 0  # the slope of such a weight is no quotient
    return both, dh, jax.device_put(np.asarray(weights, np.float32))


def exact(activation, both, dh, weights):
    """float64."""
    with jax.enable_x64(True):
        both, dh, weights = (jax.device_put(np.asarray(x, np.float64)) for x in (both, dh, weights))
        F = dh.shape[1]
        h, pull = jax.vjp(lambda x: ACTIVATIONS[activation](x[:, :F]) * x[:, F:], both)
        return [np.asarray(x) for x in (pull(dh * weights[:, None])[0], h * weights[:, None], jnp.sum(dh * h, axis=1))]


def assert_right(found, right):
    for ours, theirs, bounds in zip(found, right, ((2**-8, 1e-4), (2**-8, 1e-4), (1e-5, 2e-5)), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, *bounds)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes_of_activations(activation):
    x = np.concatenate([np.linspace(-40, 40, 801), np.linspace(-1, 1, 401)])
    value, slope = value_and_slope(activation, jax.device_put(np.asarray(x, np.float32)))
    with jax.enable_x64(True):
        right = jax.jvp(ACTIVATIONS[activation], (jax.device_put(x),), (jnp.ones_like(x),))
    np.testing.assert_allclose(value, right[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, right[1], rtol=1e-5, atol=1e-5)


def test_an_activation_that_does_not_exist():
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_pytorch_tanh, got 'relu'"):
        value_and_slope("relu", jnp.ones(3))


@pytest.mark.parametrize("activation", mostly_slow([*ACTIVATIONS], "silu"))
def test_gated_rows_in_the_interpreter(activation):
    given = drawn(TAIL, 192)
    with compat.interpreted():
        found = jax.jit(lambda *x: gated_backward(activation, *x))(*given)
        assert_right(found, exact(activation, *given))
        both, *others = given
        again = jax.jit(lambda *x: gated_backward(activation, *x, woven=True))(woven(both), *others)
        for ours, theirs in zip((unwoven(again[0]), *again[1:]), found, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not look for races")
def test_buffers_are_not_used_before_they_are_free():
    with compat.interpreted(detect_races=True):
        jax.block_until_ready(gated_backward("silu", *drawn(64 * 20, 256)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernel_can_be_lowered_for_a_gpu(hopper, activation):
    shapes = ((1000, 1024), jnp.bfloat16), ((1000, 512), jnp.bfloat16), ((1000,), jnp.float32)
    arrays = [jax.ShapeDtypeStruct(*each) for each in shapes]
    run = jax.jit(lambda *x: gated_backward(activation, *x))
    assert "gated_backward_mosaic_gpu" in run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((64, 64), jnp.float32, "rows must be bfloat16 or float16, not float32"),
        ((64, 96), jnp.bfloat16, "rows must have a multiple of 64 channels, not 96"),
        ((64, 0), jnp.float16, "rows must have a multiple of 64 channels, not 0"),
        ((12, 64), jnp.bfloat16, "rows must be a multiple of 8, not 12"),
        ((0, 64), jnp.bfloat16, "rows must be a multiple of 8, not 0"),
        ((64, 64), jnp.float16, None),
    ],
)
def test_what_the_kernel_refuses(hopper, shape, dtype, reason):
    assert refusal(jax.ShapeDtypeStruct(shape, dtype)) == reason


def test_another_device_is_refused():
    with pytest.raises(NotImplementedError, match=r"Hopper GPU \(compute capability 9.0\)"):
        gated_backward("silu", *drawn(64, 64))

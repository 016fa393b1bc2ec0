"""Kernels that move and sum rows on a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)
from ops.test_row_moves import array, assert_spread, rows_of, spread

from stellarbyte_jax.ops.pallas.row_moves import spread_rows, sum_rows

pytestmark = pytest.mark.gpu
SHAPES = [(4099, 1024, 8), (1000, 256, 3), (515, 1536, 6), (77, 4096, 8), (30, 16384, 1)]  # tokens, channels, choices


@pytest.mark.parametrize(("tokens", "channels", "choices"), SHAPES)
def test_rows_in_their_places(tokens, channels, choices):
    x, (numbers, rows) = array(tokens, channels), spread(tokens, choices)
    run = jax.jit(spread_rows, static_argnums=2)
    for _ in range(3):
        assert_spread(np.asarray(run(x, numbers, rows), np.float32), x, numbers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "channels", "choices"), SHAPES)
def test_sums_of_rows(tokens, channels, choices, dtype):
    count = tokens * choices
    y, numbers = array(count, channels), rows_of(count, (tokens, choices))
    y, numbers = y.at[1].set(jnp.nan), jnp.where(numbers == 1, count, numbers)
    weights = jax.device_put(np.asarray(np.random.default_rng(2).standard_normal((tokens, choices)), np.float32))
    run = jax.jit(sum_rows, static_argnums=3)
    rows = np.append(np.asarray(y, np.float64), np.zeros((1, channels)), axis=0)[np.asarray(numbers)]
    for given in (weights, None):
        factors = np.ones(weights.shape) if given is None else np.asarray(given, np.float64)
        first = np.asarray(run(y, numbers, given, dtype))
        np.testing.assert_allclose(
            first.astype(np.float64),
            np.einsum("nk,nkd->nd", factors, rows),
            rtol=2**-8 if dtype == jnp.bfloat16 else 1e-5,
            atol=1e-5,
        )
        np.testing.assert_array_equal(np.asarray(run(y, numbers, given, dtype)), first)

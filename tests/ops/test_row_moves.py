"""Kernels that move and sum rows, without a GPU: compiled for one as far as a CPU can, and interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.row_moves import refusal, spread_rows, sum_rows

# In the interpreter of jax 0.10 a copy that reaches behind an array writes nothing.
TAIL, TOKENS = (203, 53) if jax.__version_info__ >= (0, 11) else (192, 50)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)


def rows_of(count, shape, seed=0):
    """Numbers of rows, one in six of none."""
    random = np.random.default_rng(seed)
    found = random.integers(0, count, shape)
    found[random.random(shape) < 1 / 6] = count
    return jax.device_put(np.asarray(found, np.int32))


def array(*shape, seed=1):
    return jax.device_put(np.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16))


def spread(tokens, choices, seed=0):
    """Rows for tokens, each another one, one in six of none; and how many there are."""
    random = np.random.default_rng(seed)
    rows = tokens * choices
    numbers = random.permutation(rows).reshape(tokens, choices)
    numbers[random.random(numbers.shape) < 1 / 6] = rows
    return jax.device_put(np.asarray(numbers, np.int32)), rows


def assert_spread(found, x, numbers):
    for choice in range(numbers.shape[1]):
        taken = np.flatnonzero(np.asarray(numbers[:, choice]) < len(found))
        np.testing.assert_array_equal(found[np.asarray(numbers[taken, choice])], np.asarray(x, np.float32)[taken])


@pytest.mark.parametrize("case", mostly_slow([(1, 3), (TOKENS, 3), (64, 8)], (TOKENS, 3)))
def test_rows_in_their_places(case):
    tokens, choices = case
    x, (numbers, rows) = array(tokens, 256), spread(tokens, choices)
    with compat.interpreted():
        found = np.asarray(jax.jit(spread_rows, static_argnums=2)(x, numbers, rows), np.float32)
    assert_spread(found, x, numbers)


SUMS = [((TOKENS, 3), jnp.bfloat16, True), ((TOKENS, 3), jnp.float32, False), ((1, 8), jnp.float32, True)]


@pytest.mark.parametrize("case", mostly_slow(SUMS, *SUMS[:2]))
def test_sums_of_rows(case):
    shape, dtype, weighted = case
    y, numbers = array(40, 256), rows_of(40, shape)
    y = y.at[3].set(jnp.inf)  # of a row that nobody sums
    numbers = jnp.where(numbers == 3, 40, numbers)
    weights = (
        jax.device_put(np.asarray(np.random.default_rng(2).standard_normal(shape), np.float32)) if weighted else None
    )
    with compat.interpreted():
        found = np.asarray(jax.jit(sum_rows, static_argnums=3)(y, numbers, weights, dtype), np.float64)
    rows = np.append(np.asarray(y, np.float64), np.zeros((1, 256)), axis=0)[np.asarray(numbers)]
    right = np.einsum("nk,nkd->nd", np.ones(shape) if weights is None else np.asarray(weights, np.float64), rows)
    np.testing.assert_allclose(found, right, rtol=2**-8 if dtype == jnp.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not look for races")
def test_buffers_are_not_used_before_they_are_free():
    """Some turns of each block, so that every buffer is used again."""
    count = 3 * 32 * 7  # tiles of 32 rows, by three blocks
    x, (numbers, rows) = array(count, 256), spread(count, 2)
    y, of_tokens = array(40, 256), rows_of(40, (count // 4, 4))
    with compat.interpreted(detect_races=True):
        jax.block_until_ready(spread_rows(x, numbers, rows))
        jax.block_until_ready(sum_rows(y, of_tokens, None, jnp.float32))


@pytest.mark.parametrize(("tokens", "channels", "choices"), [(16384, 1024, 8), (1003, 256, 3), (4096, 4096, 8)])
def test_the_kernels_can_be_lowered_for_a_gpu(hopper, tokens, channels, choices):
    rows = tokens * choices
    x, y = (jax.ShapeDtypeStruct((count, channels), jnp.bfloat16) for count in (tokens, rows))
    of_tokens = jax.ShapeDtypeStruct((tokens, choices), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens, choices), jnp.float32)

    def run(x, y, of_tokens, weights):
        return spread_rows(x, of_tokens, rows), sum_rows(y, of_tokens, weights, jnp.bfloat16)

    program = jax.jit(run).trace(x, y, of_tokens, weights).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "rows", "reason"),
    [
        ((4, 256), jnp.float32, 8, "rows must be bfloat16 or float16, not float32"),
        ((4, 320), jnp.bfloat16, 8, "rows must have a multiple of 256 channels, and at most 16384, not 320"),
        ((4, 16640), jnp.bfloat16, 8, "rows must have a multiple of 256 channels, and at most 16384, not 16640"),
        ((4, 256), jnp.bfloat16, 0, "there are no rows"),
    ],
)
def test_what_the_kernels_refuse(hopper, shape, dtype, rows, reason):
    assert refusal(jax.ShapeDtypeStruct(shape, dtype), rows) == reason


def test_sums_that_do_not_fit_a_multiprocessor_are_refused(hopper):
    with pytest.raises(NotImplementedError, match="16 rows of 8192 channels are too many for the memory"):
        sum_rows(array(8, 8192), rows_of(8, (4, 16)), None, jnp.bfloat16)


def test_another_device_is_refused():
    with pytest.raises(NotImplementedError, match=r"Hopper GPU \(compute capability 9.0\)"):
        spread_rows(array(4, 256), rows_of(4, (4, 2)), 8)

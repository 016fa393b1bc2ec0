"""Keys and values as they are stored, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.model.state.storage import Storage, quantize

# Largest error of a number, as a share of the largest of its head.
ERRORS = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127, "float8_e4m3fn": 2**-4}


@pytest.mark.parametrize("dtype", ERRORS)
def test_what_is_written_to_a_layer_is_read_back(dtype):
    storage = Storage.empty((3, 2, 5, 2, 8), dtype)
    k, v = (jax.random.normal(jax.random.key(n), (2, 2, 2, 8)) * 10.0**n for n in (0, 2))
    layer, slots = jnp.asarray(1), jax.device_put(np.asarray([[4, 0], [9, 2]], np.int32))  # slot 9 does not exist
    written = storage.write(layer, slots, storage.encode(k, v))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), written) == jax.tree.map(lambda x: (x.shape, x.dtype), storage)
    keys, values = written.layer(layer).decode(jnp.dtype("float32"))
    for found, given in ((keys, k), (values, v)):
        largest = np.abs(given).max(axis=-1, keepdims=True)
        for row, token, slot in ((0, 0, 4), (0, 1, 0), (1, 1, 2)):
            error = np.abs(found[row, slot] - given[row, token]) / largest[row, token]
            assert error.max() <= ERRORS[dtype] * 1.01
        assert np.all(np.asarray(found)[[0, 0, 0, 1, 1, 1, 1], [1, 2, 3, 0, 1, 3, 4]] == 0)
    for other in (0, 2):
        assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(written.layer(jax.device_put(other))))
    assert written.layer(layer).decode(jnp.dtype("bfloat16"))[0].dtype == jnp.bfloat16


def test_the_largest_number_of_a_head_has_the_largest_code_and_zeros_stay():
    x = jnp.stack([jnp.linspace(-3.0, 1.5, 8), jnp.zeros(8)])[None, None]
    codes, scales = quantize(x, "int8")
    assert codes.dtype == jnp.int8 and codes[0, 0, 0, 0] == -127
    np.testing.assert_allclose(scales[0, 0, 0], 3 / 127, rtol=1e-6)
    assert np.all(np.asarray(codes[0, 0, 1]) == 0) and np.all(np.isfinite(scales))
    codes, _ = quantize(x, "float8_e4m3fn")
    assert float(codes[0, 0, 0, 0]) == -448.0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_slots_that_a_head_takes_have_the_scales_of_their_tokens(dtype):
    """Of slots and tokens behind them, each head others."""
    random = np.random.default_rng(0)
    tokens = [random.standard_normal((2, 5, 3, 4)).astype(np.float32) * random.random((2, 5, 3, 1)) for _ in range(2)]
    empty = Storage.empty((1, 2, 1, 3, 4), dtype)
    parts = [empty.encode(*(jnp.asarray(x[:, at]) for x in tokens)) for at in (slice(3), slice(3, 5))]
    order = np.stack([random.permutation(5)[:4] for _ in range(6)]).reshape(2, 3, 4).swapaxes(1, 2)
    taken = parts[0].joined(parts[1]).taken(jnp.asarray(order, jnp.int32)).decode(jnp.dtype("float32"))
    for found, x in zip(taken, tokens, strict=True):
        np.testing.assert_allclose(found, np.take_along_axis(x, order[..., None], axis=1), atol=0.02)

"""The kernel of attention over a cache on a Hopper GPU, beside float32: lengths, rings, dtypes, groups of heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decode_cases import cached
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)

from stellarbyte_jax.ops.attention import attention

pytestmark = pytest.mark.gpu
DTYPES = ("bfloat16", "int8", "float8_e4m3fn", "float16")
CASES = {
    "one row": {"B": 1, "S": 2048, "N": 32, "K": 8},
    "rows of any length": {"B": 33, "S": 1000, "N": 8, "K": 2},
    "wide": {"B": 3, "S": 4096, "N": 16, "K": 4, "H": 128},
    "one head for all": {"B": 5, "S": 700, "N": 40, "K": 1, "H": 128},
    "each head its own": {"B": 2, "S": 514, "N": 5, "K": 5},
    "a tile": {"B": 3, "S": 64},
    "several queries": {"B": 3, "S": 1026, "T": 7, "N": 8, "K": 2, "H": 128, "window": 300},
    "a ring": {"B": 7, "S": 1024, "N": 8, "K": 2, "window": 1024, "ring": True},
    "a ring with sinks": {"B": 7, "S": 516, "T": 2, "N": 8, "K": 2, "window": 511, "ring": True, "visible": 4},
    "soft cap": {"B": 2, "S": 900, "softcap": 5.0},
    "memory slots, some empty": {"B": 4, "S": 800, "invalid": 70, "lengths": [100, 800, 71, 333]},
    "long": {"B": 2, "S": 32768, "N": 8, "K": 2},
}


def attend(storage, mask, softcap, told):
    layer = storage.keys.shape[0] - 1
    ends_B = jnp.max(jnp.where(mask.k_positions_BSK[:, :, 0] >= 0, jnp.arange(storage.slots)[None] + 1, 0), axis=1)

    def run(q, storage):
        k, v = storage.layer(jnp.int32(layer)).decode(q.dtype)
        stored = storage.stored(jnp.int32(layer), ends_B if told else None)
        found = attention(q, k, v, mask, softcap=softcap, stored=stored, return_lse=True, implementation="pallas")
        return found.out_BTNH, found.lse_BTN

    return jax.jit(run)


def assert_right(settings, told=True):
    settings = dict(settings)
    softcap = settings.pop("softcap", None)
    q, keys, values, storage, mask = cached(**settings)
    run = attend(storage, mask, softcap, told)
    out, lse = (np.asarray(x, np.float32) for x in run(q, storage))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(
            lambda q: attention(q, keys, values, mask, softcap=softcap, return_lse=True, implementation="reference")
        )(q.astype(jnp.float32))
    assert np.isfinite(out).all()
    error = np.linalg.norm(out - exact.out_BTNH) / np.linalg.norm(exact.out_BTNH)
    assert error < 6e-3, error
    np.testing.assert_allclose(lse, exact.lse_BTN, atol=1e-3)
    return lambda: run(q, storage)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype):
    compute = "float16" if dtype == "float16" else "bfloat16"
    assert_right({"dtype": dtype, "compute": compute, **CASES[name]})


@pytest.mark.parametrize("seed", range(16))
def test_drawn_caches(seed):
    random = np.random.default_rng(seed)
    K, ring = int(random.integers(1, 9)), bool(random.integers(2))
    S, T = 2 * int(random.integers(32, 1500)), int(random.choice([1, 1, 3]))
    visible = int(random.integers(0, 5)) if ring else 0
    window = S - visible - (T - 1) if ring else (int(random.integers(1, S)) if seed % 3 else None)
    settings = {
        "B": int(random.integers(1, 20)),
        "N": K * int(random.integers(1, 9)),
        "H": int(random.choice([64, 128])),
        "dtype": str(random.choice(DTYPES[:3])),
    }
    assert_right(
        {**settings, "K": K, "S": S, "T": T, "ring": ring, "visible": visible, "window": window, "seed": seed},
        told=bool(seed % 2),
    )


def test_the_same_inputs_give_the_same_bits():
    again = assert_right(CASES["rows of any length"])
    first = again()
    for _ in range(10):
        for x, y in zip(again(), first, strict=True):
            np.testing.assert_array_equal(x, y)

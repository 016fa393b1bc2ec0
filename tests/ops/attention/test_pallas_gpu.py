"""Kernels of attention on a Hopper GPU, beside float32: all lengths, masks and documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_cases import inputs
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)

from stellarbyte_jax.ops.attention import Mask, attention

pytestmark = pytest.mark.gpu

CASES = {
    "causal": {"S": 2048, "H": 128},
    "grouped": {"S": 1024, "N": 8, "K": 2},
    "odd length": {"S": 1371, "N": 2, "K": 1},
    "packed": {"S": 2000, "packed": True, "H": 128},
    "window": {"S": 2048, "window": 300},
    "window, always visible, packed": {"S": 1500, "window": 100, "visible": True, "packed": True, "H": 128},
    "soft cap": {"S": 1024, "softcap": 5.0, "H": 128},
    "queries for the last keys": {"S": 1200, "T": 300, "window": 700},
    "memory slots, some empty": {"S": 1200, "T": 1000, "window": 600, "packed": True, "invalid": slice(0, 90)},
    "memory slots, every second one": {"S": 700, "T": 500, "window": 60, "visible": True, "invalid": slice(0, 90, 2)},
    "a tile": {"S": 128},
}


def both(q, k, v, g, mask, softcap, implementation):
    def run(*qkv):
        found = attention(*qkv, mask, softcap=softcap, return_lse=True, implementation=implementation)
        return found.out_BTNH, found.lse_BTN

    found, pull = jax.vjp(run, q, k, v)
    return *found, *pull((g.astype(q.dtype), jnp.zeros_like(found[1])))


def exact(q, k, v, g, mask, softcap):
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        return jax.jit(lambda *x: both(*x, mask, softcap, "reference"))(*wide, g)


def assert_close(found, right, sees_BTN):
    for name, ours, exact in zip(("out", "lse", "dq", "dk", "dv"), found, right, strict=True):
        ours, exact = np.asarray(ours, np.float32), np.asarray(exact)
        assert np.isfinite(ours).all(), name
        if name in ("out", "lse"):
            ours, exact = ours[sees_BTN], exact[sees_BTN]
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert error < (1e-4 if name == "lse" else 5e-3), (name, error)


def assert_right(q, k, v, g, mask, softcap=None):
    sees_BT = np.asarray(mask.allowed().any(axis=(1, 3)))
    sees_BTN = np.broadcast_to(sees_BT[..., None], q.shape[:3])
    g = jnp.asarray(np.where(sees_BTN[..., None], g, 0))
    run = jax.jit(lambda *x: both(*x, mask, softcap, "pallas"))
    found = run(q, k, v, g)
    assert_close(found, exact(q, k, v, g, mask, softcap), sees_BTN)
    return lambda: run(q, k, v, g)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    settings = {"N": 2, "K": 2, "H": 64, "dtype": dtype, **CASES[name]}
    softcap = settings.pop("softcap", None)
    assert_right(*inputs(True, **settings), softcap)


@pytest.mark.parametrize("seed", range(12))
def test_drawn_documents_lengths_and_windows(seed):
    random = np.random.default_rng(seed)
    S = int(random.integers(128, 1500))
    T = S if seed % 2 else int(random.integers(128, S + 1))
    K = int(random.integers(1, 3))
    shapes = [(2, n, h, int(random.choice([64, 128]))) for n, h in ((T, 2 * K), (S, K), (S, K), (T, 2 * K))]
    shapes = [(*shape[:3], shapes[0][3]) for shape in shapes]
    q, k, v, g = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    ids = np.zeros((2, S), np.int32)
    for row in ids:
        starts = random.choice(np.arange(1, S), int(random.integers(0, 30)), replace=False)
        row[:] = np.searchsorted(np.sort(starts), np.arange(S), side="right")
    segments = jnp.asarray(ids)
    window = None if seed % 3 == 0 else int(random.integers(1, S))
    visible = jnp.asarray(random.random((2, S, 1)) < 0.01) if seed % 4 == 1 else None
    rows_1S = jnp.arange(S, dtype=jnp.int32)[None]
    mask = Mask(
        rows_1S[:, S - T :], rows_1S[..., None], segments[:, S - T :], segments, None, visible, window, aligned=True
    )
    assert_right(q, k, v, np.asarray(g, np.float32), mask, 7.0 if seed % 5 == 2 else None)


def test_the_same_inputs_give_the_same_bits():
    again = assert_right(*inputs(True, S=1500, N=8, K=2, H=128, window=400, packed=True, dtype="bfloat16"))
    first = again()
    for _ in range(10):
        for x, y in zip(again(), first, strict=True):
            np.testing.assert_array_equal(x, y)


def test_large_scores_do_not_overflow():
    q, k, v, g, mask = inputs(True, S=512, N=2, K=1, H=64, packed=True, dtype="bfloat16")
    assert_right(8 * q, 8 * k, v, g, mask)

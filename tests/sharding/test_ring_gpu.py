"""Blocks of the ring with the real kernels, on one GPU; the ring itself where there are two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rows_on_a_mesh import AXES

from stellarbyte_jax.ops.attention import Mask, attention
from stellarbyte_jax.ops.attention.blocks import Keys, Queries, joined
from stellarbyte_jax.ops.attention.blocks_cudnn import CudnnBlocks
from stellarbyte_jax.ops.attention.blocks_pallas import PallasBlocks
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.attention import attention as on_mesh
from stellarbyte_jax.sharding.ring import dealt_order

pytestmark = pytest.mark.gpu

B, T = 3, 4096
# Starts of documents. Of the chunks of 2,048, one is reached into from the one before, one has a start at its edge, and
# one is reached into by a single token.
STARTS = ((5, 700, 1500, 3000), (1, 2048, 2050), (2047, 2049, 4095))


def arrays(H=64, N=8, K=2):
    random = np.random.default_rng(0)
    shapes = [(B, T, n, H) for n in (N, K, K, N)]
    return [jax.device_put(np.asarray(random.standard_normal(shape), jnp.bfloat16)) for shape in shapes]


def documents():
    ids = np.ones((B, T), np.int32)
    for row, starts in enumerate(STARTS):
        for start in starts:
            ids[row, start:] += 1
    return jax.device_put(ids)


def exact(q, k, v, slope, segments, window=None):
    """Output, log-sum-exp and gradients of whole rows by the reference in float32."""
    rows_1T = jnp.arange(T, dtype=jnp.int32)[None]
    mask = Mask(rows_1T, rows_1T[..., None], segments, segments, window=window, aligned=True)
    wide = [x.astype(jnp.float32) for x in (q, k, v, slope)]

    def loss(q, k, v):
        found = attention(q, k, v, mask, return_lse=True, implementation="reference")
        return jnp.sum(found.out_BTNH * wide[3]), (found.out_BTNH, found.lse_BTN)

    with jax.default_matmul_precision("highest"):
        gradients, (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*wide[:3])
    return {"output": out, "lse": lse, **dict(zip(("queries", "keys", "values"), gradients, strict=True))}


def close(found, expected):
    for name, value in found.items():
        value = np.asarray(value, np.float32)
        assert np.isfinite(value).all(), name
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert error < (1e-3 if name == "lse" else 1e-2), (name, error)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("H", "N", "K"), [(64, 8, 2), (128, 4, 4)])
@pytest.mark.parametrize(
    ("blocks", "kernel"),
    [(CudnnBlocks(), "cudnn"), (PallasBlocks(), "attention_dkv"), (PallasBlocks(700), "attention_dkv")],
    ids=["cudnn", "pallas", "pallas, window"],
)
def test_blocks_of_a_row_together_equal_the_row(H, N, K, packed, blocks, kernel):
    """Two blocks of queries; the second merges an earlier block of keys with its own."""
    q, k, v, slope = arrays(H, N, K)
    segments = documents() if packed else None
    rows_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if isinstance(blocks, PallasBlocks) and jax.devices()[0].compute_capability != "9.0":
        pytest.skip("needs a Hopper GPU")

    def chunk(first, of):
        return jax.tree.map(lambda x: x[:, : T // 2] if first else x[:, T // 2 :], of)

    @jax.jit
    def both(q, k, v, slope):
        queries, keys = Queries(q, rows_BT, segments), Keys(k, v, rows_BT[..., None], segments)
        low, high, early, late = chunk(True, queries), chunk(False, queries), chunk(True, keys), chunk(False, keys)
        of_low = blocks.attend_own(low, early)
        of_high = blocks.attend_own(high, late).merged(blocks.attend(high, early))
        dlow, dearly = blocks.gradients_own(low, early, of_low, chunk(True, slope))
        dhigh, dlate = blocks.gradients_own(high, late, of_high, chunk(False, slope))
        dhigh_more, dearly_more = blocks.gradients(high, early, of_high, chunk(False, slope))
        out, lse = joined(of_low, of_high)
        dk, dv = joined(jax.tree.map(jnp.add, dearly, dearly_more), dlate)
        return {"output": out, "lse": lse, "queries": joined(dlow, dhigh + dhigh_more), "keys": dk, "values": dv}

    assert kernel in both.lower(q, k, v, slope).as_text()
    window = getattr(blocks, "window", None)
    close(both(q, k, v, slope), exact(q, k, v, slope, segments, window))


@pytest.mark.skipif("jax.device_count() < 2", reason="needs two GPUs")
@pytest.mark.parametrize(("packed", "window"), [(False, None), (True, None), (True, 700)])
def test_a_ring_equals_the_whole_row(packed, window):
    q, k, v, slope = arrays()
    segments = documents() if packed else None
    devices = 4 if jax.device_count() >= 4 else 2
    order = dealt_order(T, devices)
    rows_1T = jax.device_put(order)[None]
    own = None if segments is None else segments[:, order]

    def loss(q, k, v):
        mask, kernel = Mask(rows_1T, rows_1T[..., None], own, own, window=window), "pallas" if window else "cudnn"
        out = on_mesh(q, k, v, mask, implementation=kernel, dealt=True).out_BTNH
        return jnp.sum((out * slope[:, order]).astype(jnp.float32)), out

    expected = exact(q, k, v, slope, segments, window)
    with jax.set_mesh(make_mesh({**AXES, "context": devices})):
        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*(x[:, order] for x in (q, k, v)))
        found = {"output": out, **dict(zip(("queries", "keys", "values"), gradients, strict=True))}
    close(found, {name: value[:, order] for name, value in expected.items()})

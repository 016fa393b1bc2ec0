"""Blocks of attention by the kernels for Hopper GPUs, in the interpreter: two chunks of a row together are the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow

from stellarbyte_jax.ops.attention import Mask, attention
from stellarbyte_jax.ops.attention.blocks import Keys, Queries, joined
from stellarbyte_jax.ops.attention.blocks_pallas import PallasBlocks, refuse_pallas_blocks
from stellarbyte_jax.ops.pallas import compat

B, T, H, N, K = 2, 400, 64, 2, 1  # chunks of 200: their last tiles are filled up
GAP = 1000  # between the places of two chunks that a device has
CASES = {
    "plain": {},
    "packed": {"starts": ((5, 150, 330), (200,))},
    "window, soft cap": {"window": 70, "softcap": 2.0},
    "window, sinks, packed": {"starts": ((5, 150, 330), (199,)), "window": 30, "sinks": 3},
    "a gap, window": {"window": 1100, "gap": GAP},
}
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not know transposed matrices"
)


def made(starts=(), window=None, sinks=0, softcap=None, gap=0):
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((B, T, n, H)), jnp.bfloat16) for n in (N, K, K, N)]
    places = np.arange(T, dtype=np.int32)
    places[T // 2 :] += gap
    ids, firsts = np.ones((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, cuts in enumerate(starts):
        for start in cuts:
            ids[row, start:] += 1
            firsts[row, start:] = start
    segments = jnp.asarray(ids) if starts else None
    always = jnp.asarray(np.arange(T)[None] - firsts < sinks)[..., None] if sinks else None
    places_BT = jnp.broadcast_to(places, (B, T))
    mask = Mask(places_BT, places_BT[..., None], segments, segments, always_visible_BSK=always, window=window)
    return arrays, mask, softcap


def of_blocks(q, k, v, slope, mask, softcap):
    queries = Queries(q, mask.q_positions_BT, mask.q_segments_BT)
    keys = Keys(k, v, mask.k_positions_BSK, mask.k_segments_BS, mask.always_visible_BSK)
    chunk = lambda first, of: jax.tree.map(lambda x: x[:, : T // 2] if first else x[:, T // 2 :], of)  # noqa: E731
    blocks = PallasBlocks(mask.window, softcap)
    low, high, early, late = chunk(True, queries), chunk(False, queries), chunk(True, keys), chunk(False, keys)
    of_low = blocks.attend_own(low, early)
    of_high = blocks.attend_own(high, late).merged(blocks.attend(high, early))
    dlow, dearly = blocks.gradients_own(low, early, of_low, chunk(True, slope))
    dhigh, dlate = blocks.gradients_own(high, late, of_high, chunk(False, slope))
    dhigh_more, dearly_more = blocks.gradients(high, early, of_high, chunk(False, slope))
    out, lse = joined(of_low, of_high)
    dk, dv = joined(jax.tree.map(jnp.add, dearly, dearly_more), dlate)
    return {"output": out, "lse": lse, "queries": joined(dlow, dhigh + dhigh_more), "keys": dk, "values": dv}


def of_row(q, k, v, slope, mask, softcap):
    def loss(*wide):
        found = attention(*wide, mask, softcap=softcap, return_lse=True, implementation="reference")
        return jnp.sum(found.out_BTNH * slope.astype(jnp.float32)), (found.out_BTNH, found.lse_BTN)

    gradients, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(*(x.astype(jnp.float32) for x in (q, k, v)))
    return {"output": out, "lse": lse, **dict(zip(("queries", "keys", "values"), gradients, strict=True))}


def close(found, expected):
    for name, value in found.items():
        value = np.asarray(value, np.float32)
        assert np.isfinite(value).all(), name
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert error < (1e-3 if name == "lse" else 1e-2), (name, error)


@interpreted
@pytest.mark.parametrize("name", mostly_slow(CASES, "plain", "window, sinks, packed", "a gap, window"))
def test_blocks_of_a_row_together_equal_the_row(name):
    arrays, mask, softcap = made(**CASES[name])
    expected = jax.jit(lambda *x: of_row(*x, mask, softcap))(*arrays)
    with compat.interpreted():
        close(jax.jit(lambda *x: of_blocks(*x, mask, softcap))(*arrays), expected)


@interpreted
def test_tokens_of_two_chunks_with_a_gap_are_attended_over_as_their_places_say():
    arrays, mask, softcap = made(**CASES["a gap, window"])
    q, k, v, slope = arrays
    expected = jax.jit(lambda *x: of_row(*x, mask, softcap))(*arrays)

    def own(q, k, v, slope):
        queries, keys = Queries(q, mask.q_positions_BT), Keys(k, v, mask.k_positions_BSK)
        blocks = PallasBlocks(mask.window)
        found = blocks.attend_own(queries, keys)
        dq, (dk, dv) = blocks.gradients_own(queries, keys, found, slope)
        return {"output": found.out_BTNH, "lse": found.lse_BTN, "queries": dq, "keys": dk, "values": dv}

    with compat.interpreted():
        close(jax.jit(own)(q, k, v, slope), expected)


@interpreted
def test_queries_that_see_no_key_of_a_block_change_nothing():
    arrays, mask, _ = made(**CASES["packed"])
    q, k, v, slope = (x[:, :200] for x in arrays)
    places = jnp.broadcast_to(jnp.arange(200, dtype=jnp.int32), (B, 200))
    ids = jnp.ones((B, 200), jnp.int32)
    queries, keys = Queries(q, places + 200, ids + 1), Keys(k, v, places[..., None], ids)
    blocks = PallasBlocks(None)
    with compat.interpreted():
        found = jax.jit(blocks.attend)(queries, keys)
        assert np.all(found.lse_BTN < -1e29) and np.all(found.out_BTNH == 0)
        seen = found._replace(lse_BTN=jnp.zeros_like(found.lse_BTN))
        dq, dkv = jax.jit(blocks.gradients)(queries, keys, seen, slope)
        assert all(np.all(np.asarray(d) == 0) for d in (dq, *dkv))
    del mask


def test_what_the_blocks_refuse(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)
    q = jnp.ones((1, 512, 2, 64), jnp.bfloat16)
    refuse_pallas_blocks(q, None)
    for arrays, reason in (
        ((q[:, :250], None), "125 queries of 125 keys: at least 128"),
        ((q[:, :408].repeat(2, axis=1)[:, :504], None), "chunks of 252 positions: a multiple of 8"),
        ((q.astype(jnp.float32), None), "dtype float32"),
        ((q[..., :32], None), "head size 32"),
        ((q, jnp.ones((1, 512, 2), bool)), "from some heads only"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            refuse_pallas_blocks(*arrays)

"""Kernels of attention without a GPU: which tiles they read, what they compute, whether they can be compiled."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_cases import check, forward_and_gradients, inputs
from helpers.grids import mostly_slow
from helpers.numpy_attention import numpy_attention

from stellarbyte_jax.ops import dispatch
from stellarbyte_jax.ops.attention import Dropout, attention
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.seen_keys import HALF, PINNED, key_ranges, query_ranges, seen_keys

CASES = {
    "causal": {"S": 256},
    "grouped, odd length": {"S": 203, "N": 4, "K": 2},
    "packed, one key head, wide": {"S": 200, "N": 2, "K": 1, "packed": True, "H": 128},
    "window, packed": {"S": 330, "window": 40, "packed": True},
    "window, always visible, packed, soft cap": {
        "S": 330,
        "window": 40,
        "packed": True,
        "visible": True,
        "softcap": 2.0,
    },
    "window, always visible": {"S": 400, "B": 1, "window": 70, "visible": True},
    "queries for the last keys, soft cap": {"S": 300, "T": 140, "softcap": 2.0},
    "memory slots, every second one": {"S": 300, "T": 200, "window": 60, "visible": True, "invalid": slice(0, 8, 2)},
    "memory slots, some empty": {"S": 200, "T": 140, "window": 9, "packed": True, "invalid": slice(0, 3)},
}
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not know transposed matrices"
)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)


def case(name):
    settings = {"N": 2, "K": 2, "H": 64, "dtype": "bfloat16", **CASES[name]}
    softcap = settings.pop("softcap", None)
    return inputs(True, **settings), softcap


@interpreted
@pytest.mark.parametrize(
    "name",
    mostly_slow(
        CASES, "grouped, odd length", "window, always visible, packed, soft cap", "memory slots, every second one"
    ),
)
def test_values_and_gradients_are_those_of_the_definition(name):
    (q, k, v, g, mask), softcap = case(name)
    expected = numpy_attention(q, k, v, mask, g, softcap=softcap)
    g = np.where(expected.sees_BTN[..., None], g, 0)
    with compat.interpreted():
        found, slopes = forward_and_gradients(
            q, k, v, g, mask, softcap=softcap, implementation="pallas", return_lse=True
        )
        check(found, slopes, expected, v.dtype)


@interpreted
def test_the_log_sum_exp_has_a_gradient():
    (q, k, v, _, mask), _ = case("packed, one key head, wide")

    def by(implementation, *arrays):
        found = attention(*arrays, mask, return_lse=True, implementation=implementation)
        return jnp.sum(jnp.sin(3 * found.lse_BTN)) + jnp.sum(found.out_BTNH.astype(jnp.float32))

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    right = jax.grad(lambda *x: by("reference", *x), argnums=(0, 1, 2))(*wide)
    with compat.interpreted():
        found = jax.jit(jax.grad(lambda *x: by("pallas", *x), argnums=(0, 1, 2)))(q, k, v)
        for ours, exact in zip(found, right, strict=True):
            assert np.linalg.norm(ours.astype(jnp.float32) - exact) < 0.01 * np.linalg.norm(exact)


@interpreted
def test_warpgroups_wait_for_each_other():
    (q, k, v, g, mask), _ = case("packed, one key head, wide")
    with compat.interpreted(detect_races=True):
        jax.block_until_ready(forward_and_gradients(q, k, v, g, mask, implementation="pallas"))


def drawn(random):
    """Whether each query sees each key, and what says so to the kernels."""
    S = int(random.integers(130, 700))
    T = int(random.integers(64, S + 1))
    starts = np.sort(random.choice(np.arange(1, S), int(random.integers(0, 6)), replace=False))
    segments = np.searchsorted(starts, np.arange(S), side="right").astype(np.int32)
    window = None if random.random() < 0.3 else int(random.integers(1, S))
    pinned = random.random(S) < 0.02 if random.random() < 0.5 else None
    valid = np.arange(S) >= random.integers(0, 90) if random.random() < 0.3 else None
    t, s = np.arange(S - T, S)[:, None], np.arange(S)[None]
    near = np.ones((T, S), bool) if window is None else t - s < window
    near |= False if pinned is None else pinned[None]
    sees = (s <= t) & near & (segments[S - T :, None] == segments[None]) & (True if valid is None else valid[None])
    arrays = [None if x is None else jnp.asarray(x)[None] for x in (segments, pinned, valid)]
    return sees, seen_keys(T, arrays[0], window, *arrays[1:])


def in_tiles(sees, rows, columns):
    """Whether any, and whether every, query of a tile sees any, or every, key of one."""
    T, S = sees.shape
    padding = [(0, -T % rows), (0, -S % columns)]
    tiles = lambda x: x.reshape(-(-T // rows), rows, -(-S // columns), columns)  # noqa: E731
    return tiles(np.pad(sees, padding)).any((1, 3)), tiles(np.pad(sees, padding)).all((1, 3))


@pytest.mark.parametrize("seed", range(20))
def test_tiles_that_are_read_hold_all_that_is_seen_and_those_without_a_mask_nothing_else(seed):
    sees, seen = drawn(np.random.default_rng(seed))
    T, S = sees.shape
    firsts, documents = np.asarray(seen.first_BT)[0], np.asarray(seen.document_BT)[0]
    kinds = np.ones(S) if seen.kinds_BS is None else np.asarray(seen.kinds_BS)[0]
    t, s = np.arange(S - T, S)[:, None], np.arange(S)[None]
    by_kernels = (s <= t) & (((s >= firsts[:, None]) & (kinds > 0)) | ((s >= documents[:, None]) & (kinds == PINNED)))
    np.testing.assert_array_equal(by_kernels, sees)
    for tile in (64, 128):
        table = np.asarray(key_ranges(seen, tile))[:, 0]
        some, _ = in_tiles(sees, 2 * HALF, tile)
        _, whole = in_tiles(sees, HALF, tile)
        for number, (pinned, pinned_end, first, end, *most) in enumerate(table.T):
            read = [*range(pinned, pinned_end), *range(first, end)]
            assert len(set(read)) == len(read) and 0 <= min(read) and max(read) < some.shape[1]
            assert set(np.flatnonzero(some[number])) <= set(read)
            for half in range(2):
                row = 2 * number + half
                unmasked = range(max(-(-most[half] // tile), first), min((row * HALF + S - T + 1) // tile, end))
                assert all(whole[row, key] for key in unmasked if row < len(whole) and (row + 1) * HALF <= T)
    table = np.asarray(query_ranges(seen, HALF))[:, 0]
    some, whole = in_tiles(sees, HALF, 2 * HALF)[0], in_tiles(sees, HALF, HALF)[1]
    for number, (first, end, *unmasked_end) in enumerate(table.T):
        assert 0 <= first <= end <= len(some)
        assert set(np.flatnonzero(some[:, number])) <= set(range(first, end))
        for half in range(2):
            column = 2 * number + half
            behind = -(-max((column + 1) * HALF - 1 - (S - T), 0) // HALF)
            for row in range(max(behind, first), min(unmasked_end[half], end)):
                assert column >= whole.shape[1] or (row + 1) * HALF > T or (column + 1) * HALF > S or whole[row, column]


def test_tiles_that_nobody_sees_are_not_read():
    seen = seen_keys(1024, jnp.zeros((1, 1024), jnp.int32), 128)
    _, _, first, end, *_ = np.asarray(key_ranges(seen, 128))[:, 0]
    np.testing.assert_array_equal(end - first, [1] + [2] * 7)
    first, end, *_ = np.asarray(query_ranges(seen, 64))[:, 0]
    np.testing.assert_array_equal(end - first, [4] * 7 + [2])
    packed = seen_keys(1024, jnp.arange(1024, dtype=jnp.int32)[None] // 128, None)
    _, _, first, end, *_ = np.asarray(key_ranges(packed, 128))[:, 0]
    np.testing.assert_array_equal(end - first, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_can_be_lowered_for_a_gpu(hopper, name):
    (q, k, v, g, mask), softcap = case(name)
    run = jax.jit(lambda *x: jax.vjp(lambda *qkv: attention(*qkv, mask, softcap=softcap, implementation="pallas"), *x))
    program = jax.jit(lambda q, k, v, g: run(q, k, v)[1](run(q, k, v)[0]._replace(out_BTNH=g)))
    text = program.trace(q, k, v, jnp.asarray(g)).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("attention", "attention_dq", "attention_dkv"):
        assert f"{kernel}_mosaic_gpu" in text


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({"S": 128}, {"prune_below": 0.1}, "pruning of low weights"),
        ({"S": 128}, {"dropout": Dropout(0.1, jax.random.key(0))}, "attention dropout"),
        ({"S": 128}, {"return_weights": True}, "attention weights as a result"),
        ({"S": 128, "dtype": "float32"}, {}, "dtype float32"),
        ({"S": 128, "H": 96}, {}, "head size 96: 64 or 128 is needed"),
        ({"S": 200, "T": 127}, {}, "127 queries of 200 keys: at least 128, and not more than keys, are needed"),
        ({"S": 128, "T": 129}, {}, "129 queries of 128 keys"),
    ],
)
def test_what_the_kernels_refuse(hopper, settings, options, reason):
    aligned = settings.get("T", 0) <= settings["S"]
    q, k, v, _, mask = inputs(aligned, **{"N": 2, "K": 2, "H": 64, "dtype": "bfloat16", **settings})
    with pytest.raises(NotImplementedError, match=f"attention: pallas refused: {reason}"):
        attention(q, k, v, mask.replace(aligned=True), implementation="pallas", **options)


def test_another_device_and_many_queries_of_a_cache_are_refused(monkeypatch):
    q, k, v, _, mask = inputs(True, N=2, K=2, H=64, S=128, dtype="bfloat16")
    with pytest.raises(NotImplementedError, match=r"pallas refused: .* Hopper GPU \(compute capability 9.0\)"):
        attention(q, k, v, mask, implementation="pallas")
    with pytest.raises(NotImplementedError, match="over a cache: pallas refused: 128 queries of 1 heads: at most 56"):
        attention(q, k, v, mask.replace(aligned=False), implementation="pallas")
    by_head = mask.replace(window=5, always_visible_BSK=jnp.ones((1, 128, 2), bool))
    with pytest.raises(NotImplementedError, match="a window does not hide from some heads only"):
        attention(q, k, v, by_head, implementation="pallas")


def test_it_is_taken_by_name_alone(hopper, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_logged", set())
    caplog.set_level(logging.INFO)
    for softcap in (None, 2.0):
        q, k, v, _, mask = inputs(True, N=2, K=2, H=64, S=128, dtype="bfloat16")
        jax.eval_shape(lambda *x, mask=mask, softcap=softcap: attention(*x, mask, softcap=softcap), q, k, v)
    assert [m.split("using ")[1].split()[0] for m in caplog.messages] == ["xla", "reference"]

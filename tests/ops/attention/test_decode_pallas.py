"""The kernel of attention over a cache without a GPU: what it computes and reads, whether it can be compiled."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decode_cases import cached
from helpers.grids import mostly_slow
from helpers.numpy_attention import numpy_attention

from stellarbyte_jax.ops import dispatch
from stellarbyte_jax.ops.attention import attention
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.decode import TILE, splits_of
from stellarbyte_jax.ops.stored import Stored

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not know transposed matrices"
)
CASES = {
    "one query, any lengths": {"B": 3, "S": 320},
    "one head for all, wide": {"S": 256, "N": 5, "K": 1, "H": 128},
    "each head its own, slots that no tile divides": {"S": 202, "N": 3, "K": 3},
    "many splits": {"B": 1, "S": 1280, "K": 1, "lengths": [1187]},
    "several queries, window, soft cap": {"T": 5, "S": 258, "window": 40, "softcap": 2.0},
    "ring": {"B": 4, "S": 128, "window": 128, "ring": True},
    "ring with sinks, several queries": {"B": 3, "T": 2, "S": 132, "window": 120, "ring": True, "visible": 4},
    "int8": {"S": 330, "dtype": "int8", "softcap": 3.0},
    "float8, wide, ring": {"S": 194, "H": 128, "dtype": "float8_e4m3fn", "window": 190, "ring": True, "visible": 2},
    "int8, float16 queries": {"S": 128, "dtype": "int8", "compute": "float16", "T": 3},
    "float16": {"S": 128, "dtype": "float16", "compute": "float16", "N": 8},
    "memory slots, some empty": {"S": 192, "invalid": 70, "lengths": [100, 190]},
}

ALWAYS = (
    "one query, any lengths",
    "many splits",
    "ring with sinks, several queries",
    "float8, wide, ring",
    "memory slots, some empty",
)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)


def case(settings):
    settings = dict(settings)
    softcap = settings.pop("softcap", None)
    return *cached(**settings), softcap


@partial(jax.jit, static_argnames=("softcap", "implementation"))
def attend(q, storage, mask, ends_B, softcap=None, implementation="pallas"):
    layer = jnp.int32(storage.keys.shape[0] - 1)
    k, v = storage.layer(layer).decode(q.dtype)
    stored = storage.stored(layer, ends_B)
    return attention(q, k, v, mask, softcap=softcap, stored=stored, return_lse=True, implementation=implementation)


def check(found, q, keys, values, mask, softcap):
    exact = numpy_attention(q, keys, values, mask, np.zeros(q.shape), softcap=softcap)
    sees = exact.sees_BTN
    assert found.out_BTNH.dtype == q.dtype and found.lse_BTN.dtype == jnp.float32 and sees.any()
    assert np.isfinite(np.asarray(found.out_BTNH, np.float32)).all()
    # Weights are rounded, and sums; keys and values of 8 bits are what they are.
    np.testing.assert_allclose(np.asarray(found.out_BTNH, np.float32)[sees], exact.out[sees], atol=0.02)
    error = np.linalg.norm(np.asarray(found.out_BTNH, np.float32)[sees] - exact.out[sees])
    assert error < 6e-3 * np.linalg.norm(exact.out[sees])
    np.testing.assert_allclose(np.asarray(found.lse_BTN)[sees], exact.lse_BTN[sees], atol=3e-4)


def ends_of(mask):
    places = np.asarray(mask.k_positions_BSK)[:, :, 0]
    return jnp.asarray([np.flatnonzero(row >= 0)[-1] + 1 for row in places], jnp.int32)


@interpreted
@pytest.mark.parametrize(
    "name",
    mostly_slow(CASES, *ALWAYS),
)
def test_values_are_those_of_the_definition(name):
    q, keys, values, storage, mask, softcap = case(CASES[name])
    with compat.interpreted():
        check(attend(q, storage, mask, ends_of(mask), softcap), q, keys, values, mask, softcap)


def drawn(seed):
    random = np.random.default_rng(seed)
    K, H = int(random.choice([1, 2, 3])), int(random.choice([64, 128]))
    ring = bool(random.integers(2))
    S = 2 * int(random.integers(TILE // 2, 160))
    T = int(random.choice([1, 1, 2, 7]))
    visible = int(random.integers(0, 5)) if ring else 0
    window = S - visible - (T - 1) if ring else (int(random.integers(1, S)) if random.random() < 0.5 else None)
    return dict(
        B=int(random.integers(1, 4)), T=T, S=S, N=K * int(random.integers(1, 8)), K=K, H=H, ring=ring, window=window,
        visible=visible, dtype=str(random.choice(["bfloat16", "int8", "float8_e4m3fn"])), seed=seed,
        softcap=3.0 if random.random() < 0.3 else None, layers=int(random.integers(1, 3)),
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize("seed", mostly_slow(range(24), 0, 1, 2))
def test_drawn_caches(seed):
    q, keys, values, storage, mask, softcap = case(drawn(seed))
    with compat.interpreted():
        ends = ends_of(mask) if seed % 2 else None
        check(attend(q, storage, mask, ends, softcap), q, keys, values, mask, softcap)


@interpreted
@pytest.mark.parametrize("told", [True, False])
def test_tiles_without_a_key_that_is_seen_are_not_read(told):
    q, keys, values, storage, mask = cached(S=512, lengths=[100, 300], window=None if told else 20)
    firsts = [0, 0] if told else [64, 256]
    slots = np.arange(512)[None]
    dead = jnp.asarray((slots >= np.asarray([[128], [320]])) | (slots < np.asarray(firsts)[:, None]))
    poison = lambda x: jnp.where(dead[None, :, :, None, None], jnp.uint16(0x7FC0), x)  # noqa: E731 (a NaN)
    storage = storage.replace(keys=poison(storage.keys), values=poison(storage.values))
    with compat.interpreted():
        found = attend(q, storage, mask, ends_of(mask) if told else None)
        check(found, q, keys, values, mask, None)


@interpreted
def test_arrays_are_a_cache_too_and_a_row_without_keys_gives_numbers():
    q, keys, values, _, mask = cached(S=128, lengths=[1, 128])
    mask = mask.replace(k_positions_BSK=mask.k_positions_BSK.at[0].set(-1))
    with compat.interpreted():
        arrays = [x.astype(q.dtype) for x in (keys, values)]
        found = jax.jit(lambda *x: attention(*x, mask, return_lse=True, implementation="pallas"))(q, *arrays)
        check(found, q, *arrays, mask, None)


@interpreted
def test_no_thread_waits_in_vain_or_reads_too_early():
    q, _, _, storage, mask = cached(S=202, T=2)
    with compat.interpreted(detect_races=True):
        jax.block_until_ready(attend(q, storage, mask, None))


def test_splits_fill_the_device_and_are_not_smaller_than_two_tiles(monkeypatch):
    monkeypatch.setattr(compat, "processors", lambda: 132)
    assert [splits_of(8, 32), splits_of(8, 256), splits_of(1, 4096)] == [16, 64, 64]
    assert [splits_of(256, 32), splits_of(256, 6), splits_of(1024, 256), splits_of(8, 1)] == [3, 3, 1, 1]


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_can_be_lowered_for_a_gpu_and_the_cache_is_not_copied(hopper, name):
    q, _, _, storage, mask, softcap = case(CASES[name])
    run = jax.jit(lambda *x: attend(*x, softcap=softcap))
    text = run.trace(q, storage, mask, ends_of(mask)).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_decode_mosaic_gpu" in text and "attention_decode_join_mosaic_gpu" in text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"compute": "float32"}, "dtype float32"),
        ({"dtype": "float32"}, "a cache of float32"),
        ({"H": 96}, "head size 96: 64 or 128 is needed"),
        ({"T": 29}, "29 queries of 2 heads: at most 56 read the same keys"),
        ({"S": 131}, "131 slots: an even number, and at least 64, is needed"),
        ({"S": 62}, "62 slots: an even number"),
    ],
)
def test_what_the_kernel_refuses(hopper, settings, reason):
    q, _, _, storage, mask = cached(**{"S": 128, **settings})
    with pytest.raises(NotImplementedError, match=f"attention over a cache: pallas refused: {reason}"):
        attend(q, storage, mask, None)


def test_keys_of_some_heads_or_documents_and_other_devices_are_refused(monkeypatch):
    q, _, _, storage, mask = cached(S=128)
    with pytest.raises(NotImplementedError, match=r"Hopper GPU \(compute capability 9.0\)"):
        attend(q, storage, mask, None)
    by_head = mask.replace(k_positions_BSK=jnp.broadcast_to(mask.k_positions_BSK, (2, 128, 2)))
    ids = mask.replace(q_segments_BT=jnp.ones((2, 1), jnp.int32), k_segments_BS=jnp.ones((2, 128), jnp.int32))
    seen_by_head = mask.replace(window=3, always_visible_BSK=jnp.ones((2, 128, 2), bool))
    for other, reason in ((by_head, "head to head"), (seen_by_head, "head to head"), (ids, "several documents")):
        with pytest.raises(NotImplementedError, match=reason):
            attend(q, storage, other, None)


def test_it_is_taken_by_name_alone(hopper, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_logged", set())
    caplog.set_level(logging.INFO)
    q, _, _, storage, mask = cached(S=128)
    attend(q, storage, mask, None, implementation="auto")
    assert [m.split("using ")[1].split()[0] for m in caplog.messages] == ["reference"]


def test_what_is_stored_has_the_shapes_that_it_says():
    _, _, _, storage, _ = cached(S=128, dtype="int8")
    stored = storage.stored(jnp.int32(0), None)
    assert isinstance(stored, Stored) and stored.key_scales.shape == (2, 2, 2, 128)

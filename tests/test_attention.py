"""Does each attention implementation equal the maths, forward and backward?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.attention import attention, cached_attention, segment_bounds

CPU = ["reference", "xla"]
GPU = [pytest.param("cudnn", marks=pytest.mark.gpu), pytest.param("xla", marks=pytest.mark.gpu)]
CASES = {
    "causal": {},
    "grouped": {"K": 2},
    "one key head": {"K": 1},
    "odd length": {"T": 77},
    "window": {"window": 9},
    "window, packed, grouped": {"window": 9, "segments": True, "K": 2},
    "packed": {"segments": True},
    "packed, odd length": {"segments": True, "T": 77},
    "window longer than the row": {"window": 500},
    "window, pinned": {"window": 9, "pinned": True},
    "window, pinned, packed, grouped": {"window": 9, "pinned": True, "segments": True, "K": 2},
}


def numpy_attention(q, k, v, segment_ids=None, window=None, softcap=None, pinned=None, prune_below=0.0):
    """float64, one loop a row, head and query: the definition and nothing else."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                seen = [
                    s
                    for s in range(t + 1)
                    if (window is None or t - s < window or (pinned is not None and pinned[b, s]))
                    and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])
                ]
                scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(H)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                weights[weights < prune_below] = 0
                out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


def inputs(T=64, N=4, K=4, H=16, B=2, segments=False, window=None, pinned=False, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(T + K), 3)
    q = jax.random.normal(keys[0], (B, T, N, H), dtype)
    k = jax.random.normal(keys[1], (B, T, K, H), dtype)
    v = jax.random.normal(keys[2], (B, T, K, H), dtype)
    ids = None
    if segments:
        ids = np.zeros((B, T), np.int32)
        for b, cuts in enumerate([(5, 6, 30, T), (T - 10,)]):  # the second row ends in padding
            start = 0
            for number, end in enumerate(cuts, 1):
                ids[b, start:end] = number
                start = end
        ids = jnp.asarray(ids)
    same = np.ones((B, T, T), bool) if ids is None else np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :]
    pinned_BT = jnp.asarray(np.arange(T) - np.argmax(same, axis=2) < 3) if pinned else None
    return q, k, v, {"segment_ids_BT": ids, "window": window, "pinned_BT": pinned_BT}


@pytest.mark.parametrize("implementation", CPU)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, implementation):
    q, k, v, options = inputs(**CASES[case])
    ids = options["segment_ids_BT"]
    expected = numpy_attention(
        q, k, v, None if ids is None else np.asarray(ids), options["window"], pinned=options["pinned_BT"]
    )
    found = attention(q, k, v, implementation=implementation, **options)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_soft_cap_equals_the_definition():
    q, k, v, options = inputs()
    found = attention(q, k, v, logit_softcap=0.7, **options)
    np.testing.assert_allclose(found, numpy_attention(q, k, v, softcap=0.7), atol=2e-6)
    with pytest.raises(NotImplementedError, match="soft cap"):
        attention(q, k, v, logit_softcap=0.7, implementation="xla", **options)


def test_pruning_equals_the_definition_with_all_else():
    q, k, v, options = inputs(K=2, segments=True, window=9, pinned=True)
    found = attention(q, k, v, prune_below=0.3, logit_softcap=2.0, **options)
    ids, pinned = np.asarray(options["segment_ids_BT"]), np.asarray(options["pinned_BT"])
    np.testing.assert_allclose(found, numpy_attention(q, k, v, ids, 9, 2.0, pinned, 0.3), atol=2e-6)
    assert np.abs(found - attention(q, k, v, logit_softcap=2.0, **options)).max() > 0.1
    with pytest.raises(NotImplementedError, match="pruning of low weights"):
        attention(q, k, v, prune_below=0.3, implementation="xla", **options)


def gradients(q, k, v, options, implementation):
    def loss(q, k, v):
        out = attention(q, k, v, implementation=implementation, max_segments=6, **options).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(case):
    q, k, v, options = inputs(**CASES[case])
    for ours, theirs in zip(gradients(q, k, v, options, "xla"), gradients(q, k, v, options, "reference"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("implementation", GPU)
@pytest.mark.parametrize("case", CASES)
def test_fused_kernels_equal_the_reference(case, implementation):
    q, k, v, options = inputs(H=64, dtype=jnp.bfloat16, **{"T": 128, **CASES[case]})
    if implementation == "cudnn" and q.shape[1] % 2:
        with pytest.raises(NotImplementedError, match="even number"):
            attention(q, k, v, implementation=implementation, max_segments=6, **options)
        return
    if implementation == "cudnn" and options["pinned_BT"] is not None:
        with pytest.raises(NotImplementedError, match="sink tokens"):
            attention(q, k, v, implementation=implementation, max_segments=6, **options)
        return
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes bfloat16 and float32 inside
        found = attention(q, k, v, implementation=implementation, max_segments=6, **options)
        ours = gradients(q, k, v, options, implementation)
    with jax.default_matmul_precision("highest"):
        expected = attention(*exact, implementation="reference", **options)
        theirs = gradients(*exact, options, "reference")
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=3e-2)
    for a, b in zip(ours, theirs, strict=True):
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 2e-2


@pytest.mark.gpu
def test_too_many_documents_for_the_fused_kernel_are_loud():
    q, k, v, options = inputs(H=64, T=128, segments=True, dtype=jnp.bfloat16)
    out = attention(q, k, v, implementation="cudnn", max_segments=3, **options)
    assert np.isnan(np.asarray(out[0], np.float32)).all()
    assert np.isfinite(np.asarray(out[1], np.float32)).all()


@pytest.mark.gpu
def test_auto_takes_the_fused_kernel():
    q, k, v, options = inputs(H=64, T=128, segments=True, dtype=jnp.bfloat16)
    text = jax.jit(lambda q: attention(q, k, v, max_segments=6, **options)).lower(q).as_text()
    assert "cudnn" in text


@pytest.mark.parametrize("implementation", CPU)
def test_documents_of_a_row_do_not_feel_each_other(implementation):
    q, k, v, options = inputs(segments=True)

    def of_second_document(k):
        return jnp.sum(jnp.square(attention(q, k, v, implementation=implementation, **options)[0, 6:30]))

    slope = jax.grad(of_second_document)(k)[0]
    assert np.all(slope[:6] == 0) and np.all(slope[30:] == 0)
    assert np.any(slope[6:30] != 0)


def test_cached_equals_full():
    q, k, v, _ = inputs(K=2)
    positions = jnp.arange(64, dtype=jnp.int32)[None].repeat(2, axis=0)
    pinned = positions < 3
    for window, slots in ((None, 0), (7, 0), (7, 3)):
        full = attention(q, k, v, window=window, pinned_BT=pinned if slots else None)
        rest, weights = cached_attention(
            q[:, 40:], k, v, positions[:, 40:], positions[:, :, None], window=window, pinned_slots=slots
        )
        np.testing.assert_allclose(rest, full[:, 40:], atol=1e-6)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)


def test_slots_may_stand_in_any_order_and_be_empty():
    q, k, v, _ = inputs(K=2)
    order = np.random.default_rng(0).permutation(64)
    at = np.where(order < 20, -1, order)  # the first twenty are empty
    positions = jnp.full((2, 1), 63, jnp.int32)
    heads = jnp.asarray(np.broadcast_to(at[None, :, None], (2, 64, 2)), jnp.int32)
    found, _ = cached_attention(q[:, 63:], k[:, order], v[:, order], positions, heads)
    full = attention(q[:, 20:], k[:, 20:], v[:, 20:])
    np.testing.assert_allclose(found, full[:, -1:], atol=1e-6)


@pytest.mark.parametrize("case", ["causal", "window, pinned, packed, grouped"])
def test_dropout_keeps_the_mean_and_follows_its_key(case):
    q, k, v, options = inputs(**{**CASES[case], "T": 40} if "segments" in CASES[case] else {"T": 8})
    keys = jax.random.split(jax.random.key(0), 3000)
    drop = jax.vmap(lambda key: attention(q, k, v, dropout_rate=0.3, dropout_key=key, **options))(keys)
    np.testing.assert_allclose(drop.mean(0), attention(q, k, v, **options), atol=0.1)
    assert not np.allclose(drop[0], drop[1])


def test_segment_bounds():
    ids = jnp.asarray([[1, 1, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1]], jnp.int32)
    starts, lengths, count = segment_bounds(ids, 4)
    np.testing.assert_array_equal(starts, [[0, 2, 3, 5], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, 1, 2, 1], [6, -1, -1, -1]])
    np.testing.assert_array_equal(count, [4, 1])


def test_an_unknown_name_lists_what_exists():
    q, k, v, options = inputs()
    with pytest.raises(ValueError, match="no implementation 'flash'; there are auto, cudnn, xla, reference"):
        attention(q, k, v, implementation="flash", **options)

"""Masked attention to be computed: arrays, masks, and whether a result is right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.ops.attention import Mask, attention


def documents(B, S):
    """Ids of rows that hold several documents; padding (0) ends every second row."""
    ids_BS = np.zeros((B, S), np.int32)
    for b in range(B):
        cuts = (S // 4, S // 4 + 1, 2 * S // 3, S) if b % 2 == 0 else (S - S // 3,)
        start = 0
        for number, end in enumerate(cuts, 1):
            ids_BS[b, start:end], start = number, end
    return ids_BS


def inputs(
    aligned,
    S=20,
    T=None,
    N=4,
    K=4,
    H=8,
    B=2,
    window=None,
    packed=False,
    visible=False,
    by_head=False,
    invalid=None,
    dtype="float32",
):
    """Arrays with a mask, and a cotangent of the result."""
    T, random = T or S, np.random.default_rng(S + K)
    q, k, v, g = (
        random.normal(size=(B, n, h, H)).astype(jnp.dtype(dtype)) for n, h in ((T, N), (S, K), (S, K), (T, N))
    )
    ids_BS = documents(B, S) if packed else None
    rows_1S = np.arange(S, dtype=np.int32)[None]
    if aligned:
        q_positions, k_positions = rows_1S[:, S - T :], rows_1S[..., None]
        q_ids = None if ids_BS is None else ids_BS[:, S - T :]
    else:
        heads = K if by_head else 1
        order = [[random.permutation(S) for _ in range(heads)] for _ in range(B)]
        k_positions = np.moveaxis(np.asarray(order, np.int32), 1, 2)
        k_positions = np.where((k_positions > 0) & (k_positions % 4 == 1), -1, k_positions)  # empty slots
        q_positions = np.asarray([random.permutation(S + T)[:T] for _ in range(B)], np.int32)
        q_ids = None if ids_BS is None else np.ones((B, T), np.int32)
    always = (k_positions < 3) if visible else None
    if visible and packed:
        first = np.argmax(ids_BS[:, :, None] == ids_BS[:, None, :], axis=2)
        always = (rows_1S - first < 3)[..., None]
    valid = None
    if invalid is not None:
        valid = np.ones((B, S), bool)
        valid[:, invalid] = False
    fields = [
        None if x is None else jax.device_put(x) for x in (q_positions, k_positions, q_ids, ids_BS, valid, always)
    ]
    q, k, v = (jax.device_put(x) for x in (q, k, v))
    return q, k, v, g, Mask(*fields, window=window, max_segments=6 if packed else None, aligned=aligned)


@partial(jax.jit, static_argnames=("implementation", "softcap", "prune_below", "return_weights", "return_lse"))
def forward_and_gradients(q, k, v, g, mask, **options):
    found, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, **options), q, k, v)
    return found, pull(jax.tree.map(jnp.zeros_like, found)._replace(out_BTNH=g))


def check(found, slopes, expected, dtype):
    """Where a query sees a key: what others give is not defined, but finite."""
    eps, sees = float(jnp.finfo(dtype).eps), expected.sees_BTN
    assert found.out_BTNH.dtype == dtype
    out = np.asarray(found.out_BTNH, np.float64)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[sees], expected.out[sees], atol=16 * eps)
    for slope, exact in zip(slopes, expected.slopes, strict=True):
        assert np.isfinite(np.asarray(slope, np.float64)).all()
        assert np.linalg.norm(np.asarray(slope, np.float64) - exact) < 8 * eps * np.linalg.norm(exact)
    if found.lse_BTN is not None:
        assert found.lse_BTN.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(found.lse_BTN)[sees], expected.lse_BTN[sees], atol=64 * eps)
    if found.weights_BKGTS is not None:
        assert found.weights_BKGTS.dtype == jnp.float32
        B, K, G, T, _ = found.weights_BKGTS.shape
        sees_BKGT = np.moveaxis(sees.reshape(B, T, K, G), 1, 3)
        weights, exact = np.asarray(found.weights_BKGTS)[sees_BKGT], expected.weights_BKGTS[sees_BKGT]
        np.testing.assert_allclose(weights, exact, atol=2e-6)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
        assert np.all(weights[exact == 0] == 0)

"""Attention and its gradients by the definition, in float64 with one loop a row, head and query."""

from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """Result, weights, log-sum-exp, and the gradients of ``sum(out * g)``; a query without keys has zeros."""

    out: np.ndarray
    weights_BKGTS: np.ndarray
    lse_BTN: np.ndarray
    slopes: tuple[np.ndarray, np.ndarray, np.ndarray]
    sees_BTN: np.ndarray


def numpy_attention(q, k, v, mask, g, softcap=None, prune_below=0.0) -> Found:
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    # As numpy arrays: reading one element of a jax array costs more than all the rest.
    q_segments, k_segments = (None if x is None else np.asarray(x) for x in (mask.q_segments_BT, mask.k_segments_BS))
    q_positions = np.broadcast_to(mask.q_positions_BT, (B, T))
    k_positions = np.broadcast_to(mask.k_positions_BSK, (B, S, K))
    visible = np.zeros((B, S, K), bool) if mask.always_visible_BSK is None else mask.always_visible_BSK
    visible = np.broadcast_to(visible, (B, S, K))
    valid = np.ones((B, S), bool) if mask.k_valid_BS is None else np.asarray(mask.k_valid_BS)
    out, weights, lse = np.zeros_like(q), np.zeros((B, K, N // K, T, S)), np.zeros((B, T, N))
    dq, dk, dv, sees = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros((B, T, N), bool)

    def is_seen(b, t, s, h):
        at, key = q_positions[b, t], k_positions[b, s, h]
        near = mask.window is None or at - key < mask.window or visible[b, s, h]
        same = q_segments is None or q_segments[b, t] == k_segments[b, s]
        return 0 <= key <= at and near and same and valid[b, s]

    for b, t, n in np.ndindex(B, T, N):
        h = n // (N // K)
        seen = [s for s in range(S) if is_seen(b, t, s, h)]
        if not seen:
            continue
        sees[b, t, n] = True
        scores = k[b, seen, h] @ q[b, t, n] / np.sqrt(H)
        bent = 1.0
        if softcap is not None:
            bent = 1 - np.tanh(scores / softcap) ** 2
            scores = softcap * np.tanh(scores / softcap)
        p = np.exp(scores - scores.max())
        lse[b, t, n] = scores.max() + np.log(p.sum())
        p[p < prune_below] = 0
        p /= p.sum()
        weights[b, h, n % (N // K), t, seen] = p
        out[b, t, n] = p @ v[b, seen, h]
        dp = v[b, seen, h] @ g[b, t, n]
        ds = p * (dp - p @ dp) * bent / np.sqrt(H)
        dq[b, t, n] = ds @ k[b, seen, h]
        dk[b, seen, h] += np.outer(ds, q[b, t, n])
        dv[b, seen, h] += np.outer(p, g[b, t, n])
    return Found(out, weights, lse, (dq, dk, dv), sees)

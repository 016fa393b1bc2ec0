"""Which keys a query sees, case by case, and which no window hides."""

import itertools

import jax
import numpy as np
import pytest

from stellarbyte_jax.ops.attention import Mask, always_visible

PARTS = ["window", "segments", "valid", "visible", "by head"]


@pytest.mark.parametrize("parts", [c for n in range(6) for c in itertools.combinations(PARTS, n)], ids="-".join)
def test_a_key_is_seen_if_every_rule_allows_it(parts):
    random = np.random.default_rng(len(parts))
    B, T, S, K = 2, 4, 7, 2 if "by head" in parts else 1
    q, k = random.integers(0, 8, (B, T)), random.integers(-1, 8, (B, S, K))
    q_ids, k_ids = random.integers(0, 2, (B, T)), random.integers(0, 2, (B, S))
    valid, visible = random.integers(0, 2, (B, S)) > 0, random.integers(0, 2, (B, S, K)) > 0
    window = 3 if "window" in parts else None
    arrays = {}
    if "segments" in parts:
        arrays |= {"q_segments_BT": q_ids, "k_segments_BS": k_ids}
    if "valid" in parts:
        arrays["k_valid_BS"] = valid
    if "visible" in parts:
        arrays["always_visible_BSK"] = visible
    arrays = {name: jax.device_put(x) for name, x in arrays.items()}
    found = Mask(jax.device_put(q), jax.device_put(k), window=window, **arrays).allowed()
    for b, h, t, s in np.ndindex(B, K, T, S):
        seen = 0 <= k[b, s, h] <= q[b, t]
        if window is not None and q[b, t] - k[b, s, h] >= window:
            seen &= bool("visible" in parts and visible[b, s, h])
        if "segments" in parts:
            seen &= bool(q_ids[b, t] == k_ids[b, s])
        if "valid" in parts:
            seen &= bool(valid[b, s])
        assert bool(found[b, h, t, s]) == seen


def test_first_tokens_and_compressed_slots_are_always_visible():
    positions = jax.device_put(np.asarray([[4, 0, 1, 5], [2, 3, 0, -1]], np.int32))[..., None]
    assert always_visible(positions) is None
    sinks = always_visible(positions, sink_tokens=2)
    np.testing.assert_array_equal(sinks[..., 0], [[0, 1, 1, 0], [0, 0, 1, 1]])
    slots = always_visible(positions, compressed=2)
    np.testing.assert_array_equal(np.broadcast_to(slots, (2, 4, 1))[..., 0], [[1, 1, 0, 0]] * 2)
    both = always_visible(positions, sink_tokens=2, compressed=1)
    np.testing.assert_array_equal(both[..., 0], [[1, 1, 1, 0], [1, 0, 1, 1]])

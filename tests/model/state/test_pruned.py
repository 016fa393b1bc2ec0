"""The pruned cache against its rule in numpy: the newest stay, and of the others those with most attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE, make_model, run, run_on, some_tokens

from stellarbyte_jax.config import CacheConfig
from stellarbyte_jax.model.state.cache import make_cache

HEAVY, RECENT, B, K, G, H = 2, 3, 2, 2, 2, 8


@pytest.mark.parametrize("parts", [[1] * 14, [7, 1, 1, 3, 1, 1], [2, 12]], ids=str)
def test_the_newest_stay_and_of_the_others_those_with_most_attention(parts):
    config = dataclasses.replace(BASE, num_hidden_layers=2, cache=CacheConfig(heavy_hitters=HEAVY, recent=RECENT))
    cache, random, at = make_cache(config, B, 99), np.random.default_rng(0), 0

    @jax.jit
    def append(cache, weights):
        valid_BT = jnp.ones((B, weights.shape[3]), bool)
        begun, positions_BT = cache.begin(valid_BT, None)
        k = jnp.broadcast_to(positions_BT[:, :, None, None], (*valid_BT.shape, K, H)).astype(jnp.float32)
        pruned, kv = begun.groups[0][0].at(jnp.int32(1)).append(k, -k)
        pruned = pruned.accumulate(weights)
        return begun.end(((pruned,),), positions_BT, valid_BT), pruned, kv

    scores = [[{} for _ in range(K)] for _ in range(B)]
    for T in parts:
        weights = random.uniform(size=(B, K, G, T, HEAVY + RECENT + T)).astype(np.float32)
        cache, pruned, kv = append(cache, weights)
        pruned, kv, at = *jax.device_get((pruned, kv)), at + T
        for b, h in np.ndindex(B, K):
            slots = np.asarray(kv.positions_BSK[b, :, h])
            got = weights[b, h].sum(axis=(0, 1))
            mine = scores[b][h]
            for slot, position in enumerate(slots):
                if position >= 0:
                    mine[position] = mine.get(position, 0.0) + got[slot]
            newest = [p for p in mine if p >= at - RECENT]
            older = sorted((p for p in mine if p < at - RECENT), key=lambda p: -mine[p])
            # Room that the newest do not fill yet goes to older ones.
            kept = {*newest, *older[: HEAVY + RECENT - len(newest)]}
            scores[b][h] = {p: mine[p] for p in kept}
            positions = np.asarray(pruned.positions_RBSK[1, b, :, h])
            assert set(positions[positions >= 0].tolist()) == kept
            stored = np.asarray(pruned.storage.keys[1, b, :, h, 0])
            np.testing.assert_array_equal(stored[positions >= 0], positions[positions >= 0])
            held = np.asarray(pruned.scores_RBSK[1, b, :, h])
            np.testing.assert_allclose(
                held[positions >= 0], [scores[b][h][p] for p in positions[positions >= 0]], rtol=1e-5
            )
    assert np.all(np.asarray(cache.groups[0][0].positions_RBSK[0]) == -1)  # the other layer's


def test_padding_gives_no_scores():
    config = dataclasses.replace(BASE, num_hidden_layers=1, cache=CacheConfig(heavy_hitters=HEAVY, recent=RECENT))
    cache = make_cache(config, 1, 99)
    valid_BT = jnp.asarray([[True, True, False]])
    begun, _ = cache.begin(valid_BT, None)
    k = jnp.ones((1, 3, K, H))
    pruned, kv = begun.groups[0][0].append(k, k)
    assert kv.positions_BSK[0, :, 0].tolist() == [-1] * 5 + [0, 1, -1]
    weights = jnp.zeros((1, K, G, 3, 8)).at[:, :, :, 2].set(5.0).at[:, :, :, 1, 5].set(1.0)
    pruned = pruned.accumulate(weights)
    held = np.asarray(pruned.positions_RBSK[0, 0, :, 0]), np.asarray(pruned.scores_RBSK[0, 0, :, 0])
    scores = dict(zip(*(x.tolist() for x in held), strict=True))
    assert (scores[0], scores[1]) == (2.0, 0.0)


@pytest.mark.parametrize("sinks", [0, 2])
def test_room_for_the_window_is_all_that_a_windowed_layer_needs(sinks):
    """Keys that no later token can see leave first, whatever attention they got: nothing that is seen is missing."""
    changes = {"sliding_window": 6, "sink_tokens": sinks, "num_hidden_layers": 2}
    changes["cache"] = CacheConfig(heavy_hitters=3 + sinks, recent=2)  # the token itself is the sixth of its window
    model, params = make_model(dataclasses.replace(BASE, **changes))
    tokens = some_tokens(2, 30)
    expected, found = run(model, params, tokens), []
    cache = make_cache(model.config, 2, 40)
    for first, end in ((0, 9), (9, 14), *((t, t + 1) for t in range(14, 30))):
        step, state = run_on(model, params, tokens[:, first:end], cache=cache)
        cache = state.cache
        found.append(step)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=3e-5)

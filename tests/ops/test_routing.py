"""Routing of tokens to experts, beside loops in Python and torch's top-k."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte_jax.ops import routing

STATIC = ("groups", "kept_groups", "threshold", "normalize", "scale")
choose_experts = jax.jit(routing.choose_experts, static_argnums=1, static_argnames=STATIC)
score_experts = jax.jit(routing.score_experts, static_argnums=1)
place, place_overflow = jax.jit(routing.place), jax.jit(routing.place_overflow)


def logits_of(N, E, seed=0):
    return np.random.default_rng(seed).standard_normal((N, E)).astype(np.float32)


def test_scores_are_float32_and_those_of_the_gate():
    logits = logits_of(5, 6)
    softmax = score_experts(np.asarray(logits, jnp.bfloat16), "softmax")
    assert softmax.dtype == jnp.float32
    rounded = np.asarray(np.asarray(logits, jnp.bfloat16), np.float64)
    expected = np.exp(rounded) / np.exp(rounded).sum(1, keepdims=True)
    np.testing.assert_allclose(softmax, expected, rtol=1e-5)
    np.testing.assert_allclose(score_experts(logits, "sigmoid"), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    with pytest.raises(ValueError, match="gate must be softmax or sigmoid, got 'tanh'"):
        score_experts(logits, "tanh")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_best_experts_are_chosen_with_their_scores(k, normalize):
    scores = np.array(score_experts(logits_of(7, 6), "softmax"))
    scores[2] = 0.5  # all equal: the first ones
    mask = np.arange(7) != 4
    found = jax.device_get(choose_experts(scores, k, mask_N=mask, normalize=normalize, scale=2.5))
    for n in range(7):
        order = sorted(range(6), key=lambda e: (-scores[n, e], e))[:k]
        weights = scores[n, order] / (scores[n, order].sum() if normalize else 1) * 2.5
        assert found.experts_NK[n].tolist() == (order if mask[n] else [6] * k)
        np.testing.assert_allclose(found.weights_NK[n], weights if mask[n] else 0, rtol=1e-5)


def test_a_bias_changes_the_choice_and_not_the_weights():
    scores, bias = np.float32([[0.5, 0.3, 0.2]]), np.float32([-1.0, 0.0, 0.2])
    found = choose_experts(scores, 2, bias_E=bias)
    assert found.experts_NK.tolist() == [[2, 1]]
    np.testing.assert_allclose(found.weights_NK, [[0.2, 0.3]])
    slopes = jax.jit(jax.grad(lambda s, b: choose_experts(s, 2, bias_E=b).weights_NK.sum(), (0, 1)))(scores, bias)
    np.testing.assert_array_equal(slopes[0], [[0, 1, 1]])
    np.testing.assert_array_equal(slopes[1], 0)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_groups_with_the_best_two_experts_are_kept(kept):
    scores, bias = logits_of(9, 12), logits_of(1, 12, seed=1)[0]
    found = jax.device_get(choose_experts(scores, 3, bias_E=bias, groups=4, kept_groups=kept))
    for n in range(9):
        ranked = scores[n] + bias
        best = [np.sort(ranked[3 * g : 3 * g + 3])[-2:].sum() for g in range(4)]
        groups = sorted(range(4), key=lambda g: -best[g])[:kept]
        allowed = [e for e in range(12) if e // 3 in groups]
        assert found.experts_NK[n].tolist() == sorted(allowed, key=lambda e: -ranked[e])[:3]
    alone = choose_experts(scores, kept, groups=12, kept_groups=kept)  # an expert is a group
    np.testing.assert_array_equal(alone.experts_NK, np.argsort(-scores, axis=1)[:, :kept])
    with pytest.raises(ValueError, match=r"5 groups, of which 1 are kept, do not divide 12 experts"):
        choose_experts(scores, 3, groups=5)
    with pytest.raises(ValueError, match=r"a token cannot have 4 of 3 experts"):
        choose_experts(scores, 4, groups=4)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_token_has_no_more_experts_than_its_share_of_scores_needs(normalize):
    scores, threshold = np.asarray(score_experts(2 * logits_of(40, 6), "softmax")), 0.85
    found = jax.device_get(choose_experts(scores, 4, threshold=threshold, normalize=normalize))
    sizes = set()
    for n in range(40):
        order, total, chosen = sorted(range(6), key=lambda e: -scores[n, e])[:4], 0.0, []
        for e in order:
            if total < threshold:
                chosen.append(e)
                total += scores[n, e]
        weights = scores[n, chosen] / (total if normalize else 1)
        rest = 4 - len(chosen)
        assert found.experts_NK[n].tolist() == [*chosen, *[6] * rest]
        np.testing.assert_allclose(found.weights_NK[n], [*weights, *[0] * rest], rtol=1e-5)
        sizes.add(len(chosen))
    assert sizes == {1, 2, 3, 4}


def test_other_experts_of_a_token_have_weights_in_proportion():
    scores = np.asarray(score_experts(logits_of(5, 6), "softmax"))
    found = choose_experts(scores, 2, normalize=True, scale=2.0)
    weights_of = jax.jit(routing.Choices.weights_of)
    np.testing.assert_array_equal(weights_of(found, scores, found.experts_NK), found.weights_NK)
    others, first = np.int32([[6, 0], [1, 2], [3, 6], [4, 5], [0, 1]]), np.asarray(found.experts_NK)
    weights = np.asarray(weights_of(found, scores, others))
    for n in range(5):
        chosen = scores[n, first[n]].sum()
        expected = [2 * scores[n, e] / chosen if e < 6 else 0 for e in others[n].tolist()]
        np.testing.assert_allclose(weights[n], expected, rtol=1e-5)


def by_hand(experts, priorities, used, capacity, E):
    """One pair after another."""
    used, K = list(used), experts.shape[1]
    taken, slots = np.full(experts.shape, E), np.zeros(experts.shape, int)
    for p in sorted(range(experts.size), key=lambda p: (-priorities.flat[p], p)):
        e = experts.flat[p]
        if e < E and used[e] < capacity:
            taken[p // K, p % K], slots[p // K, p % K] = e, used[e]
            used[e] += 1
    return taken, slots, used


# Few shapes, since each compiles: one token and one expert, one choice of many, all experts of a token, and between.
SHAPES = [(1, 1, 1), (7, 1, 6), (5, 4, 4), (12, 2, 3), (9, 3, 6)]
pairs = st.tuples(st.sampled_from(SHAPES), st.integers(0, 6), st.integers(0, 10**6))


def drawn(N, K, E, seed):
    random = np.random.default_rng(seed)
    experts = np.stack([random.permutation(E)[:K] for _ in range(N)])
    experts[random.random(N) < 0.2] = E
    priorities = random.integers(0, 4, (N, K)).astype(np.float32)  # with equal ones
    return random, experts, priorities


@settings(deadline=None)
@given(pairs)
def test_slots_go_to_the_highest_priorities(case):
    (N, K, E), capacity, seed = case
    random, experts, priorities = drawn(N, K, E, seed)
    used = random.integers(0, 3, E)
    found = place(experts, priorities, used, capacity)
    taken, slots, after = by_hand(experts, priorities, used, capacity, E)
    np.testing.assert_array_equal(found.experts_NK, taken)
    np.testing.assert_array_equal(found.slots_NK, slots)
    np.testing.assert_array_equal(found.used_E, after)


@settings(deadline=None)
@given(pairs, st.sampled_from([1, 4]))
def test_overflow_loses_nothing_that_any_candidate_would_take(case, M):
    (N, K, E), capacity, seed = case
    random, experts, priorities = drawn(N, K, E, seed)
    candidates = random.integers(0, E + 1, (N, M))
    wanted = experts < E
    first = place(experts, priorities, np.zeros(E, np.int32), capacity)
    found = place_overflow(first, candidates, priorities, wanted, capacity)
    got, slots, used = map(np.asarray, found)
    kept = np.asarray(first.experts_NK) < E
    np.testing.assert_array_equal(got[kept], np.asarray(first.experts_NK)[kept])
    assert (got[~wanted] == E).all(), "padding goes nowhere"
    places = [(e, s) for e, s in zip(got.flat, slots.flat, strict=True) if e < E]
    assert len(set(places)) == len(places), "no slot twice"
    assert all(s < capacity for _, s in places)
    counts = np.bincount([e for e, _ in places], minlength=E)
    np.testing.assert_array_equal(used, counts)
    assert (counts <= capacity).all()
    for n in range(N):
        of_token = [e for e in got[n] if e < E]
        assert len(set(of_token)) == len(of_token), "no expert twice"
        for k in range(K):
            if wanted[n, k] and not kept[n, k] and got[n, k] < E:
                assert got[n, k] in candidates[n]
        if wanted[n].any() and (got[n] == E).all():  # nothing at all: every candidate is full
            assert all(used[e] == capacity for e in candidates[n] if e < E)


def test_overflow_goes_down_the_list_of_each_token():
    """Two tokens want expert 0 of one slot; the second tries 2, which is full, and then 1."""
    used = np.int32([0, 0, 1])
    experts, priorities = np.int32([[0], [0]]), np.float32([[2.0], [1.0]])
    first = place(experts, priorities, used, 1)
    assert first.experts_NK.tolist() == [[0], [3]]
    found = place_overflow(first, np.int32([[1, 2], [2, 1]]), priorities, np.ones((2, 1), bool), 1)
    assert found.experts_NK.tolist() == [[0], [1]] and found.used_E.tolist() == [1, 1, 1]


def test_of_the_choices_of_a_token_the_first_is_offered_the_next_expert():
    """Both are left; experts 2 and 3, which they are offered at first, are full, and then the list has one more."""
    used, priorities = np.int32([1, 1, 1, 1, 0]), np.float32([[2.0, 1.0]])
    first = place(np.int32([[0, 1]]), priorities, used, 1)
    found = place_overflow(first, np.int32([[2, 3, 4]]), priorities, np.ones((1, 2), bool), 1)
    assert first.experts_NK.tolist() == [[5, 5]] and found.experts_NK.tolist() == [[4, 5]]


def test_a_choice_that_is_left_tries_the_first_of_the_list_beside_one_that_has_its_expert():
    used, priorities = np.int32([0, 1, 0]), np.float32([[2.0, 1.0]])
    first = place(np.int32([[0, 1]]), priorities, used, 1)
    assert first.experts_NK.tolist() == [[0, 3]]
    found = place_overflow(first, np.int32([[2]]), priorities, np.ones((1, 2), bool), 1)
    assert found.experts_NK.tolist() == [[0, 2]]


def test_a_token_gets_no_expert_twice():
    """Both of its choices are full, and its list names an expert twice; it has one more, which it had already."""
    used, priorities = np.int32([1, 1, 0, 0]), np.float32([[1.0, 1.0]])
    first = place(np.int32([[0, 1]]), priorities, used, 1)
    wanted = np.ones((1, 2), bool)
    assert place_overflow(first, np.int32([[2, 2]]), priorities, wanted, 2).experts_NK.tolist() == [[2, 4]]
    found = place_overflow(first, np.int32([[2, 2, 3]]), priorities, wanted, 2)
    assert found.experts_NK.tolist() == [[2, 3]] and found.used_E.tolist() == [1, 1, 1, 1]


def test_routing_compiles_with_a_capacity_that_is_an_array():
    experts, priorities = np.int32([[0], [0], [0]]), np.float32([[1.0], [3.0], [2.0]])
    for capacity in (0, 1, 2):
        found = place(experts, priorities, np.zeros(2, np.int32), np.int32(capacity))
        assert found.used_E.tolist() == [capacity, 0]


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def slopes_of_weighted(logits, slope):
    found = choose_experts(score_experts(logits, "sigmoid"), 3, normalize=True, scale=2.5)
    return jnp.sum(found.weights_NK * slope), found


@pytest.mark.parametrize("level", [-10, -40, -50, -90, -200])
def test_small_sigmoid_scores_have_weights_and_finite_slopes(level):
    """Down to 1e-18 the weights are those of float64; where all scores are smaller still, nothing is infinite."""
    logits = level + logits_of(5, 6)
    slope = np.random.default_rng(3).standard_normal((5, 3)).astype(np.float32)

    (_, found), slopes = jax.device_get(slopes_of_weighted(logits, slope))
    assert np.isfinite(slopes).all() and np.isfinite(found.weights_NK).all()
    if level >= -40:
        wide = 1 / (1 + np.exp(-np.take_along_axis(np.float64(logits), found.experts_NK, axis=1)))
        share = wide / wide.sum(1, keepdims=True)
        np.testing.assert_allclose(found.weights_NK, 2.5 * share, rtol=2e-5)
        expected = 2.5 * share * (1 - wide) * (slope - (slope * share).sum(1, keepdims=True))
        of_chosen = np.take_along_axis(slopes, found.experts_NK, axis=1)
        np.testing.assert_allclose(of_chosen, expected, rtol=2e-4, atol=1e-6)

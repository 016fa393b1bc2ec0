"""Balance losses beside loops over tokens, their slopes beside differences in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.balance import Routed, counts_by_expert, losses
from stellarbyte_jax.ops.routing import choose_experts, score_experts

ROWS, LENGTH, E, K = 3, 5, 4, 2


def drawn(seed=0):
    """Three rows of five tokens: the first one has padding, the second is padding alone, some tokens go nowhere."""
    random = np.random.default_rng(seed)
    N = ROWS * LENGTH
    logits = random.standard_normal((N, E))
    scores = 1 / (1 + np.exp(-random.standard_normal((N, E))))  # they do not add up to one
    mask = np.ones((ROWS, LENGTH), bool)
    mask[0, 3:] = mask[1] = False
    mask = mask.reshape(-1)
    experts = np.stack([random.permutation(E)[:K] for _ in range(N)])
    experts[random.random((N, K)) < 0.2] = E
    experts[~mask] = E
    before = random.integers(0, 9, E).astype(np.float64)
    return logits, scores, experts, mask, before


def loop(logits, scores, experts, mask, before, fixed=None):
    """Every loss, token by token, float64.

    ``fixed`` are the numbers of another call that no slope passes; they are returned too.
    """
    tokens = [n for n in range(len(mask)) if mask[n]]
    share = {n: scores[n] / scores[n].sum() for n in tokens}

    def loads_of(some, counts=None):
        counts = np.zeros(E) if counts is None else counts.copy()
        for n in some:
            for e in experts[n]:
                if e < E:
                    counts[e] += 1
        return counts / counts.sum() if counts.sum() else counts

    def mean_of(some):
        return sum((share[n] for n in some), np.zeros(E)) / max(len(some), 1)

    mean, loads, overall = mean_of(tokens), loads_of(tokens), loads_of(tokens, before)
    per_row = []
    for r in range(ROWS):
        some = [n for n in tokens if n // LENGTH == r]
        if some:
            per_row.append(E * loads_of(some) @ mean_of(some))
    entropy = {n: -sum(p * math.log(p) for p in share[n]) for n in tokens}
    fixed = fixed or {"entropy": entropy, "mean": mean}
    undecided = sum(fixed["entropy"][n] * share[n] for n in tokens) / sum(fixed["entropy"].values())
    passed = loads + mean - fixed["mean"]
    log_z = [math.log(sum(math.exp(x) for x in logits[n])) for n in tokens]
    return {
        "router_load": E * loads @ mean,
        "router_global": E * overall @ mean,
        "router_sequence": sum(per_row) / len(per_row),
        "router_entropy": E * loads @ undecided,
        "router_kl": sum(p * math.log(p * E) for p in mean),
        "router_mse": E * sum((x - 1 / E) ** 2 for x in passed),
        "router_variance": (np.std(mean) / np.mean(mean)) ** 2,
        "router_z": sum(z**2 for z in log_z) / len(log_z),
    }, fixed


NAMES = list(loop(*drawn())[0])


@jax.jit
def ours(logits, scores, experts, mask, before):
    return losses(Routed(logits, scores, experts, mask, ROWS), counts_by_expert(experts, E) + before)


@jax.jit
def values_and_slopes(logits, scores, experts, mask, before):
    """Each loss, and the slopes of each with respect to logits and scores."""
    values, pull = jax.vjp(lambda *xs: ours(*xs, experts, mask, before), logits, scores)
    slopes = {name: pull({other: jnp.float32(other == name) for other in values}) for name in values}
    return values, slopes


def floats(drawn):
    return [x.astype(np.float32) if x.dtype == np.float64 else x for x in drawn]


@pytest.mark.parametrize("seed", range(3))
def test_each_loss_equals_a_loop_over_tokens(seed):
    found, (expected, _) = ours(*floats(drawn(seed))), loop(*drawn(seed))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == jnp.float32 and value.shape == ()
        assert float(value) == pytest.approx(expected[name], rel=2e-5), name
    assert len({round(float(x), 4) for x in found.values()}) == len(found), "no two are the same"


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_of_each_loss_is_that_of_the_loop(name):
    """Counts, entropies and the mean scores that loads are put in place of are constants."""
    logits, scores, experts, mask, before = drawn()
    found = jax.device_get(values_and_slopes(*floats((logits, scores, experts, mask, before))))[1][name]
    fixed, step = loop(logits, scores, experts, mask, before)[1], 1e-6
    for number, slopes in enumerate(found):
        expected = np.zeros((len(mask), E))
        for at in np.ndindex(expected.shape):
            ends = []
            for sign in (1, -1):
                moved = [logits.copy(), scores.copy()]
                moved[number][at] += sign * step
                ends.append(loop(*moved, experts, mask, before, fixed)[0][name])
            expected[at] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(slopes, expected, atol=2e-6)
        assert not np.any(slopes[~mask]), "padding has no slope"
        assert np.any(slopes) == (number == (0 if name == "router_z" else 1))


@pytest.mark.parametrize("k", [1, 3])
def test_the_loss_of_transformers_is_ours_times_the_choices_of_a_token(k):
    """Of one layer; of several, that of transformers is of their mean loads and scores."""
    torch = pytest.importorskip("torch", reason="the peer is transformers on torch: pip install -e '.[torch]'")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits, _, _, mask, _ = drawn()
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    experts = np.where(mask[:, None], np.argsort(-scores, axis=1)[:, :k], E)
    theirs = mixtral.load_balancing_loss_func(
        (torch.tensor(logits),), E, k, torch.tensor(mask.reshape(ROWS, LENGTH), dtype=torch.long)
    )
    found = ours(*floats((logits, scores, experts, mask, np.zeros(E))))["router_load"]
    assert float(theirs) == pytest.approx(k * float(found), rel=1e-5)


def test_padding_does_not_matter_whatever_stands_there():
    logits, scores, experts, mask, before = floats(drawn())
    plain = ours(logits, scores, experts, mask, before)
    logits[~mask], scores[~mask] = 7.0, np.nan
    for name, value in ours(logits, scores, experts, mask, before).items():
        assert float(value) == float(plain[name]), name


def test_padding_has_finite_slopes_whatever_stands_there():
    logits, scores, experts, mask, before = floats(drawn())
    scores[~mask] = 0.0
    for slope in jax.tree.leaves(values_and_slopes(logits, scores, experts, mask, before)[1]):
        assert np.isfinite(slope).all()


def test_values_where_all_is_even():
    """Loads and scores of all experts are equal: what a loss is at its least, or without an influence."""
    N = E * 3
    experts = np.int32([[n % E, (n + 1) % E] for n in range(N)])
    scores = np.full((N, E), 1 / E, np.float32)
    found = ours(np.zeros_like(scores), scores, experts, np.ones(N, bool), np.zeros(E, np.float32))
    for name in ("router_load", "router_global", "router_sequence", "router_entropy"):
        assert float(found[name]) == pytest.approx(1.0, rel=1e-6), name
    for name in ("router_kl", "router_mse", "router_variance"):
        assert float(found[name]) == pytest.approx(0.0, abs=1e-6), name
    assert float(found["router_z"]) == pytest.approx(math.log(E) ** 2, rel=1e-6)


def test_values_where_one_expert_has_everything():
    N = 6
    experts, scores = np.zeros((N, 1), np.int32), np.eye(E, dtype=np.float32)[np.zeros(N, int)]
    found = ours(np.zeros_like(scores), scores, experts, np.ones(N, bool), np.zeros(E, np.float32))
    for name in ("router_load", "router_global", "router_sequence"):
        assert float(found[name]) == pytest.approx(E), name
    assert float(found["router_kl"]) == pytest.approx(math.log(E), rel=1e-5)
    assert float(found["router_mse"]) == pytest.approx(E * ((1 - 1 / E) ** 2 + (E - 1) / E**2))
    assert float(found["router_variance"]) == pytest.approx(E - 1)


def test_a_batch_of_padding_alone_gives_zeros():
    logits, scores, experts, mask, before = floats(drawn())
    nothing = np.full_like(experts, E), np.zeros_like(mask), np.zeros_like(before)
    values, slopes = jax.device_get(values_and_slopes(logits, scores, *nothing))
    for _, slope in slopes.values():
        assert np.isfinite(slope).all() and not np.any(slope)
    # An even share of nothing: the loads are 0, so the squared distance and the variance are those of zeros.
    assert sum(values.values()) == pytest.approx(1 + 1)


def test_loads_of_the_whole_batch_are_in_one_loss_alone():
    case = floats(drawn())
    more = [*case[:-1], case[-1] + np.asarray([0, 0, 0, 50], np.float32)]
    plain, moved = ours(*case), ours(*more)
    assert [name for name in NAMES if float(plain[name]) != float(moved[name])] == ["router_global"]


def test_choices_are_counted():
    experts = np.int32([[[0, 2], [3, 1]], [[1, 1], [3, 3]]])  # 3 is none
    counts = jax.jit(counts_by_expert, static_argnums=1)
    assert counts(experts, 3).tolist() == [[1, 1, 1], [0, 2, 0]]
    assert counts(experts[0], 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("scale", [1e-9, 1e-14, 1e-25, 0.0])
def test_scores_may_be_as_small_as_those_of_a_sigmoid(scale):
    """The losses read shares of a token's scores, which are the same however small those are; down to nothing."""
    logits, scores, experts, mask, before = drawn()
    small = floats((logits, scale * scores, experts, mask, before))
    found = ours(*small)
    for name, value in found.items():
        if scale > 1e-18:
            assert float(value) == pytest.approx(loop(logits, scores, experts, mask, before)[0][name], rel=2e-5), name
        assert np.isfinite(value), name
    for slope in jax.tree.leaves(values_and_slopes(*small)[1]):
        assert np.isfinite(slope).all()


def test_the_loss_of_loads_is_that_of_transformers_over_the_choices_of_a_token():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits, _, _, mask, before = floats(drawn())
    scores = jax.jit(score_experts, static_argnums=1)(logits, "softmax")
    experts = jax.jit(choose_experts, static_argnums=1)(scores, K, mask_N=mask).experts_NK
    attention_mask = torch.from_numpy(mask.reshape(ROWS, LENGTH).astype(np.int64))
    theirs = mixtral.load_balancing_loss_func((torch.from_numpy(logits),), E, K, attention_mask)
    assert float(ours(logits, scores, experts, mask, before)["router_load"]) == pytest.approx(float(theirs) / K)

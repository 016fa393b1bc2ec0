"""The layer with experts: equal to a loop over experts, and what becomes of choices that there is no room for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense_experts
from helpers.moe_layer import CAPACITY, D, E, config_of, context, layer, tokens, weights_of
from helpers.variants import BASE

from stellarbyte_jax.model.moe import dispatch_choices, overflow_candidates, room_of
from stellarbyte_jax.model.router import Decision
from stellarbyte_jax.model.state.router import Tally
from stellarbyte_jax.ops.balance import Routed
from stellarbyte_jax.ops.routing import choose_experts

EQUAL = {
    "dropless": {},
    "sigmoid, shared, factor": {"scoring_func": "sigmoid", "n_shared_experts": 2, "routed_scaling_factor": 1.7},
    "temperature": {"adaptive_temperature": True, "norm_topk_prob": False},
    "capacity": {**CAPACITY, "capacity_factor": float(E)},
    "capacity, temperature": {**CAPACITY, "capacity_factor": float(E), "adaptive_temperature": True},
}


@pytest.mark.parametrize(
    ("settings", "rows"),
    [*(("dropless", rows) for rows in ((1, 1), (3, 7), (2, 90))), *((name, (3, 7)) for name in [*EQUAL][1:])],
)
def test_layer_and_gradients_equal_a_loop_over_experts(settings, rows):
    """Of tokens, experts, router and temperature. The tokens differ in how rows of experts are laid out."""
    config = config_of(**EQUAL[settings])
    weights, (x, valid) = weights_of(config), tokens(*rows)
    ctx, slope = context(valid), np.random.default_rng(8).standard_normal((rows[0] * rows[1], D)).astype(np.float32)
    slope *= valid.reshape(-1, 1)

    def ours(weights, x):
        out = layer(config, weights, x, ctx)[0].reshape(-1, D)
        return jnp.sum(out * slope), out

    @jax.numpy_rank_promotion("allow")
    @jax.numpy_dtype_promotion("standard")
    def loop(weights, x):
        out = dense_experts.moe(config, weights, x.reshape(-1, D), jax.device_put(valid.reshape(-1)))[0]
        return jnp.sum(out * slope), out

    (_, found), slopes = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(weights, x)
    (_, expected), expected_slopes = jax.jit(jax.value_and_grad(loop, (0, 1), has_aux=True))(weights, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(slopes), jax.tree.leaves(expected_slopes), strict=True):
        if "tracked" in jax.tree_util.keystr(path):
            assert not np.any(a), path
        else:
            np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4, err_msg=str(path))
            assert np.any(a), path
    if not config.moe.n_shared_experts:
        assert not np.any(np.asarray(found)[~valid.reshape(-1)]), "padding gets nothing"


@pytest.mark.parametrize("settings", ["dropless", "capacity"])
def test_the_order_of_rows_does_not_matter(settings):
    config = config_of(**EQUAL[settings])
    weights, (x, valid) = weights_of(config), tokens(4, 40)
    order = np.asarray([2, 0, 3, 1])
    found = layer(config, weights, x, context(valid))[0]
    moved = layer(config, weights, x[order], context(valid[order]))[0]
    np.testing.assert_allclose(moved, found[order], atol=1e-6)


def test_experts_have_a_capacity_in_training_alone():
    """With room for one choice of each expert, all but a few are lost in training, and none elsewhere."""
    tight = config_of(**CAPACITY, max_capacity=2, overflow=())
    weights, (x, valid) = weights_of(tight), tokens(3, 7)
    expected = layer(config_of(), weights, x, context(valid, train=False))[0]
    np.testing.assert_array_equal(layer(tight, weights, x, context(valid, train=False))[0], expected)
    lost = np.all(np.asarray(layer(tight, weights, x, context(valid))[0] == 0), axis=-1)
    assert lost[valid].mean() > 0.5


@pytest.mark.parametrize(
    ("number", "settings", "slots"),
    [
        (100, {"num_experts": 8}, 32),  # 100 x 2 / 8 x 1.25 = 31.25
        (100, {"num_experts": 8, "capacity_factor": 1.0}, 25),
        (100, {"num_experts": 8, "capacity_factor": 1.1}, 28),
        (100, {"num_experts": 8, "num_experts_per_tok": 3, "capacity_factor": 1.0}, 38),  # 37.5
        (90, {"num_experts": 3, "capacity_factor": 1.1}, 66),  # 66.00000000000001 in floats
        (100, {"num_experts": 8, "min_capacity": 40}, 40),
        (100, {"num_experts": 8, "max_capacity": 30}, 30),
        (8, {"num_experts": 8}, 4),  # 2.5, the least is 4
        (3, {"num_experts": 8}, 3),  # no expert gets a token twice
        (1000, {"num_experts": 8, "capacity_factor": 100.0}, 1000),
    ],
)
def test_the_slots_of_an_expert(number, settings, slots):
    config = dataclasses.replace(BASE, moe={"dispatch": "capacity", **settings})
    assert config.moe.slots(number) == slots


choose = jax.jit(choose_experts, static_argnums=1, static_argnames=("normalize", "threshold"))
dispatch = jax.jit(dispatch_choices, static_argnums=0)
candidates_of = jax.jit(overflow_candidates, static_argnums=0)


def decision_of(config, scores, valid, use=None):
    """What a router would decide that has these scores."""
    scores, mask = jax.device_put((np.float32(scores), valid.reshape(-1)))
    c = config.moe
    choices = choose(scores, c.num_experts_per_tok, mask_N=mask, normalize=c.norm_topk_prob, threshold=c.dynamic_k)
    use = jax.device_put(np.float32([0.5] * c.num_experts if use is None else use))
    routed = Routed(scores, scores, choices.experts_NK, mask, valid.shape[0])
    return Decision(choices, routed, jax.device_put(np.float32(1)), use, None)


@pytest.mark.parametrize(
    ("use", "settings", "room"),
    [
        ([0.5] * 5, {}, 14),  # 20 tokens x 2 / 5 = 8, times 1 / 0.6 = 13.33
        ([0.9, 0.9, 0.9, 0.9, 0.9], {}, 8),
        ([1.0] * 5, {"num_experts_per_tok": 3}, 12),  # as 0.9
        ([0.0] * 5, {"num_experts_per_tok": 1, "capacity_factor": 9.0}, 20),  # as 0.1: 4 times 5
        ([0.0] * 5, {}, 24),  # as 0.1: 8 times 5 = 40, and there are 24 slots
        ([0.0] * 5, {"capacity_factor": 9.0}, 30),  # no more than there are tokens, with padding
        ([0.1, 0.3, 0.5, 0.7, 0.9], {}, 20),  # 8 times the mean of 5, 2.5, 1.667, 1.25, 1: 18.27, and 19
        ([0.9] * 5, {"min_capacity": 11}, 11),
        ([0.5] * 5, {"dynamic_capacity": False}, 24),
    ],
)
def test_the_room_of_experts_by_their_use(use, settings, room):
    config = config_of(**{**CAPACITY, "dynamic_capacity": True, "capacity_factor": 2.0, **settings})
    valid = np.arange(30).reshape(3, 10) % 3 > 0  # 20 of 30
    decision = decision_of(config, np.random.default_rng(0).random((30, E)), valid, use)
    slots = config.moe.slots(30)
    if use == [0.1, 0.3, 0.5, 0.7, 0.9]:
        room = int(np.ceil(8 * np.mean([1 / (u + 0.1) for u in use])))
    assert int(room_of(config, decision, slots)) == room


def test_slots_go_to_the_tokens_with_the_largest_weights():
    config = config_of(**CAPACITY, num_experts_per_tok=1, norm_topk_prob=False, max_capacity=2, overflow=())
    valid = np.ones((2, 4), bool)
    valid[0, 0] = False  # the first and best one is padding: it takes no slot
    scores = np.full((8, E), 0.01)
    scores[:, 3] = [0.9, 0.5, 0.8, 0.3, 0.6, 0.7, 0.2, 0.4]
    sent = jax.device_get(dispatch(config, with_rows(decision_of(config, scores, valid)), context(valid), None))
    assert sent.experts_NK[:, 0].tolist() == [5, 5, 3, 5, 5, 3, 5, 5]
    np.testing.assert_allclose(sent.weights_NK[:, 0], [0, 0, 0.8, 0, 0, 0.7, 0, 0])
    assert float(sent.room) == 2


def by_list(config, decision, ctx, lists, room):
    """Where choices go, one after another: the wanted expert, then the token's list. One choice a token."""
    wanted, weights = (np.asarray(x)[:, 0] for x in (decision.choices.experts_NK, decision.choices.weights_NK))
    taken, free = np.full(len(wanted), E), [room] * E
    for turn in range(1 + max(map(len, lists))):
        asking = [n for n in range(len(wanted)) if wanted[n] < E and taken[n] == E]
        for n in sorted(asking, key=lambda n: (-weights[n], n)):
            offer = wanted[n] if turn == 0 else (lists[n][turn - 1] if turn <= len(lists[n]) else E)
            if offer < E and free[offer]:
                taken[n], free[offer] = offer, free[offer] - 1
    return taken


USE = [0.9, 0.2, 0.5, 0.8, 0.1]
STEPS = {
    "next_best": lambda scores, first, before: sorted((e for e in range(E) if e != first), key=lambda e: -scores[e])[
        :2
    ],
    "cold": lambda scores, first, before: [4, 1],
    "sticky": lambda scores, first, before: [before],
}


@pytest.mark.parametrize(
    "overflow",
    [(), ("next_best",), ("cold",), ("sticky",), ("next_best", "cold"), ("cold", "next_best"), ("sticky", "cold")],
)
@pytest.mark.parametrize("seed", range(2))
def test_what_has_no_room_goes_where_the_settings_say(overflow, seed):
    """Documents of a row, padding between; an expert that most tokens want."""
    config = config_of(**CAPACITY, num_experts_per_tok=1, norm_topk_prob=False, overflow=overflow)
    random = np.random.default_rng(seed)
    scores = random.random((24, E)) * [1, 0.4, 0.7, 0.3, 0.4]
    valid, starts = random.random((2, 12)) < 0.85, random.random((2, 12)) < 0.2
    ctx, decision = context(valid, starts), decision_of(config, scores, valid, USE)
    first = np.asarray(decision.choices.experts_NK)[:, 0]
    lists = []
    for n in range(24):
        goes_on = n % 12 and not starts.reshape(-1)[n]
        before = first[n - 1] if goes_on else E
        lists.append([e for step in overflow for e in STEPS[step](np.float32(scores[n]), first[n], before)])
    room = config.moe.slots(24)
    assert room == 6 and np.bincount(first, minlength=E + 1)[:E].max() > room
    expected = by_list(config, decision, ctx, lists, room)
    sent = dispatch(config, with_rows(decision), ctx, None)
    np.testing.assert_array_equal(sent.experts_NK[:, 0], expected)
    assert np.any(expected != first)
    padded = np.pad(scores, ((0, 0), (0, 1)))
    np.testing.assert_allclose(sent.weights_NK[:, 0], padded[np.arange(24), expected], rtol=1e-6)
    if "next_best" not in overflow:
        assert (expected[valid.reshape(-1)] == E).any() or "cold" in overflow


def test_the_token_before_is_one_of_the_same_document():
    """None for the first token of a row or of a document, nor behind padding."""
    config = config_of(**CAPACITY, num_experts_per_tok=1, overflow=("sticky",))
    wanted = [0, 0, 2, 0, 2, 0, 0, 2, 0, 3, 3, 3, 3, 3, 3, 3]
    starts, valid = np.zeros((2, 8), bool), np.ones((2, 8), bool)
    starts[0, 5] = True
    valid[1, 2] = False
    decision = decision_of(config, np.eye(E)[wanted] + 0.1, valid)
    found = overflow_candidates(config, decision, context(valid, starts), None)
    assert found[:, 0].tolist() == [E, 0, 0, 2, 0, E, 0, 0, E, 0, 3, E, *[3] * 4]


def with_rows(decision):
    """The same as a tree of arrays alone."""
    return decision._replace(routed=decision.routed._replace(rows=jax.device_put(decision.routed.rows)))


def test_random_experts_are_drawn_anew_by_each_key():
    config = config_of(**CAPACITY, num_experts_per_tok=1, overflow=("random",))
    valid = np.ones((1, 2000), bool)
    decision = decision_of(config, np.ones((2000, E)) - np.arange(E) / 9, valid)
    ctx = context(valid)
    found = [np.asarray(candidates_of(config, with_rows(decision), ctx, jax.random.key(k))) for k in (0, 0, 1)]
    assert found[0].shape == (2000, 2) and np.array_equal(found[0], found[1])
    assert np.mean(found[0] == found[2]) == pytest.approx(1 / E, abs=0.03)
    np.testing.assert_allclose(np.bincount(found[0].reshape(-1), minlength=E) / 4000, 1 / E, atol=0.03)
    sent = dispatch(config, with_rows(decision), ctx, jax.random.key(0))
    counts = np.bincount(np.asarray(sent.experts_NK)[:, 0], minlength=E + 1)
    # Room is 500 for each: all is taken by the first, and of the other 1,500 each draws twice of five.
    assert counts[0] == 500 and (counts[1:E] > 200).all() and counts[E] < 1500 * (1 / E) ** 2 * 1.6


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"overflow": ()}, None),
        ({"num_experts_per_tok": E}, None),  # there is no further expert
        ({"num_experts_per_tok": E - 1}, 1),
        ({}, 2),
        ({"overflow": ("cold",)}, 2),
        ({"overflow": ("sticky",)}, 1),
        ({"overflow": ("next_best", "cold", "sticky", "random")}, 7),
    ],
)
def test_each_step_offers_two_experts(settings, count):
    config = config_of(**CAPACITY, **settings)
    valid = np.ones((1, 4), bool)
    decision = decision_of(config, np.random.default_rng(0).random((4, E)), valid)
    found = overflow_candidates(config, decision, context(valid), jax.random.key(0))
    assert (found is None) if count is None else (found.shape == (4, count) and found.dtype == jnp.int32)


@pytest.mark.parametrize("dynamic_k", [None, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_that_had_room_in_its_list(seed, dynamic_k):
    """Every step at once, several choices a token: no slot twice, no expert twice, no padding."""
    settings = {"num_experts_per_tok": 3, "capacity_factor": 0.5 if dynamic_k is None else 0.25, "dynamic_k": dynamic_k}
    config = config_of(**CAPACITY, **settings, overflow=("next_best", "cold", "sticky", "random"))
    random = np.random.default_rng(seed)
    valid = random.random((2, 12)) < 0.8
    scores = random.random((24, E)) ** 3 + 0.01
    decision, ctx, key = decision_of(config, scores, valid, random.random(E)), context(valid), jax.random.key(seed)
    sent = dispatch(config, with_rows(decision), ctx, key)
    lists = np.asarray(candidates_of(config, with_rows(decision), ctx, key))
    got, wanted = np.asarray(sent.experts_NK), np.asarray(decision.choices.experts_NK)
    slots = config.moe.slots(24)
    assert (got[wanted == E] == E).all() and (got[~valid.reshape(-1)] == E).all()
    full = np.bincount(got[got < E], minlength=E) == slots
    assert full.any() and (got[wanted < E] == E).any(), "else there is nothing to see"
    rows = np.asarray(sent.layout.rows_NK)
    assert len(set(rows[got < E])) == (got < E).sum() and (rows[got == E] == E * slots).all()
    assert (rows[got < E] // slots == got[got < E]).all()
    for n, k in np.argwhere((got == E) & (wanted < E)):
        for e in (*lists[n], wanted[n, k]):
            assert e == E or full[e] or e in got[n]
    for n in range(24):
        of_token = got[n][got[n] < E]
        assert len(set(of_token)) == of_token.size
        np.testing.assert_allclose(np.asarray(sent.weights_NK)[n][got[n] == E], 0)
        factor = 1 / max(scores[n][wanted[n][wanted[n] < E]].sum(), 1e-9)
        np.testing.assert_allclose(
            np.asarray(sent.weights_NK)[n][got[n] < E], np.float32(scores)[n, of_token] * factor, rtol=1e-5
        )


def test_what_is_lost_adds_nothing_and_the_rest_keeps_its_weights():
    """A token that lost one of two choices has the other one with the weight that it had."""
    config = config_of(**CAPACITY, max_capacity=3, overflow=(), n_shared_experts=1)
    weights, (x, valid) = weights_of(config), tokens(2, 6)
    found = np.asarray(layer(config, weights, x, context(valid))[0]).reshape(-1, D)
    flat = np.asarray(x).reshape(-1, D)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        _, _, chosen, combine = (
            np.asarray(a) for a in dense_experts.route(config, weights["router"], flat, valid.reshape(-1))
        )
        made = [dense_experts.gated(flat, *(weights["experts"][n][e] for n in ("gate_up", "down"))) for e in range(E)]
        shared = np.asarray(dense_experts.gated(flat, weights["shared"]["gate_up"], weights["shared"]["down"]))
    expected = shared.copy()
    kept = np.zeros_like(chosen)
    for e in range(E):
        best = sorted(np.flatnonzero(chosen[:, e]), key=lambda n: -combine[n, e])[:3]
        kept[best, e] = 1
        for n in best:
            expected[n] += combine[n, e] * np.asarray(made[e])[n]
    halves = (kept.sum(1) == 1) & (chosen.sum(1) == 2)
    assert halves.any() and ((kept.sum(1) == 0) & (chosen.sum(1) == 2)).any()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {**CAPACITY, "max_capacity": 3, "overflow": ("next_best",)}])
def test_the_tally_counts_tokens_and_no_padding(settings):
    config = config_of(**settings, temperature=0.5)
    weights, (x, valid) = weights_of(config), tokens(3, 6)
    before = jax.tree.map(lambda a: a[0] + 2.0, Tally.zero(config))
    _, tally, aux = layer(config, weights, x, context(valid), before)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        routed = dense_experts.route(config, weights["router"], x.reshape(-1, D), valid.reshape(-1))
    wanted = np.asarray(routed[2]).sum(0)
    real = valid.sum()
    assert wanted.sum() == 2 * real and float(tally.tokens) == real + 2
    np.testing.assert_allclose(tally.wanted, wanted + 2)
    assert float(tally.temperature) == pytest.approx(0.5 * real + 2)
    counts, lost = np.asarray(tally.counts) - 2, float(tally.lost) - 2
    assert counts.sum() + lost == 2 * real
    if settings:
        assert counts.max() == 3 and lost > 0
        np.testing.assert_allclose(tally.room, 3 + 2)
    else:
        np.testing.assert_allclose(counts, wanted)
        assert lost == 0
        np.testing.assert_allclose(tally.room, wanted.max() + 2)
    shares = np.asarray(routed[1])[valid.reshape(-1)].mean(0)
    with_before = wanted + 2
    expected = E * with_before / with_before.sum() @ shares
    assert float(aux.values()["router_global"]) == pytest.approx(expected, rel=1e-5)
    assert float(aux.values()["router_load"]) == pytest.approx(E * wanted / wanted.sum() @ shares, rel=1e-5)
    assert layer(config, weights, x, context(valid))[1] is None


@pytest.mark.parametrize("settings", [{}, {**CAPACITY, "capacity_factor": 0.7, "overflow": ("next_best", "cold")}])
def test_padding_that_is_not_finite_reaches_no_token(settings):
    """Nor counts, losses or experts. The router's own gradient is a product with all rows, as every weight's is."""
    config = config_of(num_experts_per_tok=2, **settings)
    weights, (x, valid) = weights_of(config), tokens(3, 7)
    real = jax.device_put(valid)[..., None]
    tally = jax.tree.map(lambda x: x[0], Tally.zero(config))

    @jax.jit
    def found(padding):
        def loss(experts, x):
            out, *told = layer(config, {**weights, "experts": experts}, x, context(valid), tally)
            return jnp.sum(jnp.sin(jnp.where(real, out, 0))), (out, told)

        (_, told), (of_experts, of_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            weights["experts"], jnp.where(real, x, padding)
        )
        return told, of_experts, jnp.where(real, of_x, 0)

    zeros, nans = jax.device_get((found(0.0), found(jnp.nan)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), nans, zeros)

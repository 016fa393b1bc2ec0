"""Rows of experts, beside loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte_jax.ops import expert_layout
from stellarbyte_jax.ops.expert_layout import (
    block_rows,
    from_experts,
    lay_out,
    lay_out_slots,
    lay_out_unaligned,
    to_experts,
)
from stellarbyte_jax.ops.grouped_matmul import Unaligned
from stellarbyte_jax.ops.routing import place

# tokens, choices, experts, rows of a block: one row each, several blocks of an expert, one block for all tokens
SHAPES = [(1, 1, 1, 1), (7, 2, 5, 1), (9, 3, 4, 2), (12, 2, 3, 4), (6, 4, 4, 6), (40, 2, 3, 8)]
lay_out_jit = jax.jit(lay_out, static_argnums=(1, 2))
lay_out_slots_jit, place_jit = jax.jit(lay_out_slots, static_argnums=1), jax.jit(place)
# By whether XLA sorts, which each decides when it is traced.
unaligned = {by_xla: jax.jit(lambda *given: lay_out_unaligned(*given), static_argnums=1) for by_xla in (True, False)}


def drawn(N, K, E, seed):
    random = np.random.default_rng(seed)
    experts = np.stack([random.permutation(E)[:K] for _ in range(N)])
    experts[random.random(N) < 0.2] = E
    experts[random.random((N, K)) < 0.1] = E
    if seed % 3 == 0:  # one expert has nearly all
        experts[:, 0] = np.where(experts[:, 0] < E, 0, E)
        experts[:, 1:] = np.where(experts[:, 1:] == 0, E, experts[:, 1:])
    return random, experts


def check(layout, experts, E):
    """Every pair with an expert has one row, of its expert; the others and the empty rows have none."""
    N, K = experts.shape
    pairs, rows = np.asarray(layout.pairs_S), np.asarray(layout.rows_NK)
    S, sizes = pairs.size, np.asarray(layout.groups.sizes_E)
    ends = np.cumsum(sizes)
    assert ends[-1] <= S
    for n in range(N):
        for k in range(K):
            row = rows[n, k]
            if experts[n, k] == E:
                assert row == S
            else:
                assert pairs[row] == n * K + k
                assert np.searchsorted(ends, row, side="right") == experts[n, k]
    assert (pairs < N * K).sum() == (experts < E).sum(), "no pair twice"
    if isinstance(layout.groups, Unaligned):
        assert sizes.tolist() == np.bincount(experts[experts < E], minlength=E).tolist()
    elif layout.groups.experts_G is not None:
        blocks = np.asarray(layout.groups.experts_G)
        size = S // blocks.size
        used = np.repeat(np.arange(E), sizes // size)
        np.testing.assert_array_equal(blocks[: used.size], used)
    else:
        assert (sizes == S // E).all()


@settings(deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_every_pair_has_a_row_of_its_expert(shape, seed):
    N, K, E, block = shape
    _, experts = drawn(N, K, E, seed)
    layout = lay_out_jit(experts, E, block)
    check(layout, experts, E)
    pairs = np.asarray(layout.pairs_S)
    for e in range(E):  # in the order of tokens
        of_expert = [p for p in pairs if p < N * K and experts.flat[p] == e]
        assert of_expert == sorted(of_expert)


@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(1, 2, 8), (4, 2, 8), (128, 2, 8), (300, 2, 4), (9000, 2, 8)]
)
def test_blocks_suit_the_number_of_pairs(tokens, choices, experts):
    """Rows stay bounded by the pairs, and few pairs touch few experts."""
    _, chosen = drawn(tokens, choices, experts, 0)
    layout = lay_out_jit(chosen, experts, None)
    check(layout, chosen, experts)
    size = block_rows(tokens, choices, experts)
    rows, pairs = layout.pairs_S.size, tokens * choices
    if 3 * pairs <= experts:
        assert size == 1 and layout.groups.experts_G.size == pairs
    elif tokens <= 128:
        assert layout.groups.experts_G is None and rows < experts * (tokens + 8)
    else:
        assert rows <= pairs + experts * size
    assert block_rows(16384, 8, 64) == 512


@pytest.mark.parametrize("seed", range(3))
def test_slots_are_rows(seed):
    N, K, E, capacity = 11, 2, 4, 4
    _, experts = drawn(N, K, E, seed)
    placed = place_jit(experts, np.ones((N, K), np.float32), np.zeros(E, np.int32), np.int32(capacity))
    layout = jax.device_get(lay_out_slots_jit(placed, capacity))
    placed = jax.device_get(placed)
    check(layout, placed.experts_NK, E)
    taken = placed.experts_NK
    for n, k in np.argwhere(taken < E):
        assert layout.rows_NK[n, k] == taken[n, k] * capacity + placed.slots_NK[n, k]


@pytest.mark.parametrize(("seed", "block"), [(0, 4), (1, 1), (1, 4), (2, 16)])
def test_rows_go_to_experts_and_come_back(seed, block):
    """Equal to sums over the choices of tokens, gradients too; empty rows are zero, whatever experts make of them."""
    N, K, E, D = 16, 3, 5, 4
    random, experts = drawn(N, K, E, seed)
    weights = random.random((N, K)).astype(np.float32)  # of pairs without an expert too
    x, factors = random.standard_normal((N, D)).astype(np.float32), random.standard_normal((E, D)).astype(np.float32)
    layout = lay_out_jit(experts, E, block)
    of_row = np.searchsorted(np.cumsum(layout.groups.sizes_E), np.arange(layout.pairs_S.size), side="right")
    empty = np.asarray(layout.pairs_S) == N * K

    def ours(x, weights, factors):
        rows = to_experts(x, layout)
        assert not np.asarray(rows)[empty].any() if not isinstance(rows, jax.core.Tracer) else True
        made = rows * factors[np.minimum(of_row, E - 1)]
        return from_experts(jnp.where(empty[:, None], jnp.nan, made), layout, weights)

    def plainly(x, weights, factors):
        chosen = jax.device_put(np.asarray(experts[:, :, None] == np.arange(E), np.float32))
        return jnp.einsum("nk,nke,nd,ed->nd", weights, chosen, x, factors)

    arguments = jax.device_put((x, weights, factors))
    np.testing.assert_allclose(ours(*arguments), plainly(*arguments), atol=1e-6)
    slopes = [jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), (0, 1, 2)))(*arguments) for f in (ours, plainly)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *slopes)


def test_what_choices_give_a_token_is_summed_in_float32():
    """In 16 bits each of the sums would be rounded; the gradient is, once, at the end."""
    N, K, E, D = 3, 8, 8, 16
    random = np.random.default_rng(0)
    experts = np.stack([random.permutation(E) for _ in range(N)])
    layout = lay_out_jit(experts, E, 4)
    given = jax.device_put(np.asarray(random.standard_normal((layout.pairs_S.size, D)), jnp.bfloat16))
    exact = np.asarray(given, np.float32)[layout.rows_NK].sum(axis=1)
    _, pull = jax.vjp(lambda x: to_experts(x, layout), jnp.zeros((N, D), jnp.bfloat16))
    np.testing.assert_array_equal(pull(given)[0], jax.device_put(np.asarray(exact, jnp.bfloat16)))
    np.testing.assert_allclose(from_experts(given, layout, jnp.ones((N, K))), exact, rtol=1e-6, atol=1e-6)


def test_no_array_of_all_choices_of_all_tokens_is_made():
    """The largest array of the way back is the rows', forward and backward."""
    N, K, E, D = 512, 8, 16, 32
    experts = jax.device_put(np.stack([np.random.default_rng(n).permutation(E)[:K] for n in range(N)]))
    layout = lay_out_jit(experts, E, None)

    def f(x, weights):
        return jnp.sum(from_experts(to_experts(x, layout), layout, weights) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(f, (0, 1)))(jnp.ones((N, D)), jnp.ones((N, K)))
    assert f"{N},{K},{D}" not in str(jaxpr) and f"{N * K},{D}" not in str(jaxpr)
    assert f"{layout.pairs_S.size},{D}" in str(jaxpr)


@settings(deadline=None)
@given(st.sampled_from([(1, 1, 1), (7, 2, 5), (40, 3, 4), (130, 8, 64)]), st.integers(0, 10**6), st.booleans())
def test_rows_without_empty_ones_are_in_the_order_of_experts_and_tokens(shape, seed, sorted_by_xla):
    N, K, E = shape
    _, experts = drawn(N, K, E, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_layout, "_FEW_PAIRS", 0 if sorted_by_xla else 2000)
        layout = jax.device_get(unaligned[sorted_by_xla](experts, E))
    check(layout, experts, E)
    flat = experts.reshape(-1)
    order = np.lexsort((np.arange(flat.size), flat))[: (flat < E).sum()]
    np.testing.assert_array_equal(layout.pairs_S[: order.size], order)
    assert (layout.pairs_S[order.size :] == N * K).all()
    assert layout.pairs_S.size % 8 == 0 and layout.pairs_S.size >= max(64, N * K)

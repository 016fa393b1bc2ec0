"""Sums of parts, beside the whole and beside loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops import expert_layout
from stellarbyte_jax.ops.expert_layout import (
    from_experts,
    lay_out_unaligned,
    part_of,
    parts_of,
    rows_of_share,
    to_experts,
)
from stellarbyte_jax.ops.parts import sum_of_parts

lay_out = jax.jit(expert_layout.lay_out, static_argnums=(1, 2))
lay_out_anywhere = jax.jit(lay_out_unaligned, static_argnums=1)
cut = jax.jit(part_of, static_argnums=2)
there, back = jax.jit(to_experts), jax.jit(from_experts)


def cube(number, inputs, rest):
    x, scale = inputs
    return (x * (number + rest[0])) ** 3 * scale["of all"]


@pytest.mark.parametrize(
    ("wrapped", "count"),
    [(lambda f: f, 2), *((jax.jit, count) for count in (1, 2, 5)), (jax.checkpoint, 1), (jax.checkpoint, 5)],
)
def test_as_many_parts_as_are_counted_and_their_gradients(count, wrapped):
    inputs, rest = (jnp.array([0.5, -2.0]), {"of all": jnp.array(3.0)}), [jnp.array(2)]

    def ours(inputs, count):
        return jnp.sum(jnp.sin(sum_of_parts(cube, count, inputs, rest)))

    def loop(inputs):
        return jnp.sum(jnp.sin(sum(cube(number, inputs, rest) for number in range(count))))

    number = jnp.array(count)
    np.testing.assert_allclose(wrapped(ours)(inputs, number), jax.jit(loop)(inputs), rtol=1e-6)
    found = jax.grad(wrapped(ours))(inputs, number)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, jax.jit(jax.grad(loop))(inputs))


def times_factors(inputs, layout):
    x, factors, weights = inputs
    factors_S = jnp.repeat(
        factors[layout.groups.experts_G], layout.pairs_S.size // layout.groups.experts_G.size, axis=0
    )
    return from_experts(to_experts(x, layout) * factors_S, layout, weights)


@pytest.mark.parametrize(
    ("loads", "blocks"), [*(("even", blocks) for blocks in (1, 3, 7)), ("all of one expert", 3), ("none", 3)]
)
def test_parts_of_a_layout_add_up_to_it(loads, blocks):
    """Whatever the loads, values and all gradients; the sizes of the parts' groups too."""
    N, K, E, D, M = 24, 2, 4, 3, 4
    random = np.random.default_rng(0)
    experts = {
        "even": np.stack([random.permutation(E)[:K] for _ in range(N)]),
        "all of one expert": np.tile([2, E], (N, 1)),
        "none": np.full((N, K), E),
    }[loads]
    layout = lay_out(jax.device_put(experts), E, M)
    count = parts_of(layout, blocks * M)
    used = int(layout.groups.sizes_E.sum()) // M
    assert count == max(-(-used // blocks), 1)
    parts = [cut(layout, number, blocks * M) for number in range(int(count))]
    assert {part.pairs_S.size for part in parts} == {blocks * M}
    np.testing.assert_array_equal(sum(part.groups.sizes_E for part in parts), layout.groups.sizes_E)
    inputs = tuple(
        jax.device_put(np.asarray(random.standard_normal(shape), np.float32)) for shape in ((N, D), (E, D), (N, K))
    )

    def in_parts(inputs):
        return sum_of_parts(
            lambda n, x, all_of: times_factors(x, part_of(all_of, n, blocks * M)), count, inputs, layout
        )

    def whole(inputs):
        return times_factors(inputs, layout)

    np.testing.assert_allclose(jax.jit(in_parts)(inputs), jax.jit(whole)(inputs), atol=1e-6)
    found, slopes = (jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2)))(inputs) for f in (in_parts, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, slopes)


def test_a_share_is_an_eighth_more_than_even_and_a_block_for_each_expert():
    experts = np.zeros((2048, 4), np.int32)
    layout = lay_out(experts, 8, 64)
    assert layout.groups.experts_G.size == 2048 * 4 // 64 + 8
    assert rows_of_share(layout, 2) == (2048 * 4 // 64 // 2 * 9 // 8 + 8) * 64
    assert rows_of_share(layout, 1) is None
    assert rows_of_share(lay_out(experts[:4], 8, 8), 2) is None, "one block an expert"
    assert rows_of_share(lay_out(experts[:16], 8, 16), 2) is None, "few pairs"


def test_pairs_without_an_expert_have_no_row_in_a_part_that_is_longer_than_the_layout():
    """Whatever experts make of its empty rows, which lie where the whole layout says that a pair has none."""
    E, M, blocks = 4, 4, 13
    experts = jax.device_put(np.asarray(np.repeat(np.arange(E + 1), (13, 13, 13, 5, 4)).reshape(24, 2), np.int32))
    layout = lay_out(experts, E, M)
    assert layout.groups.experts_G.size == 16 and parts_of(layout, blocks * M) == 2
    found = np.zeros((24, 1))
    for number in range(2):
        part = cut(layout, number, blocks * M)
        made = np.where(np.asarray(part.pairs_S)[:, None] < experts.size, np.float32(1), np.float32(np.nan))
        found += back(made, part, np.ones(experts.shape, np.float32))
    np.testing.assert_array_equal(found[:, 0], np.sum(np.asarray(experts) < E, axis=1))


@pytest.mark.parametrize("rows", [64, 72, 104])
@pytest.mark.parametrize("loads", ["even", "all of one expert", "none"])
def test_parts_of_rows_that_begin_anywhere_add_up_to_the_layout(loads, rows):
    N, K, E = 101, 3, 4
    random = np.random.default_rng(0)
    experts = {
        "even": np.stack([random.permutation(E + 1)[:K] for _ in range(N)]),
        "all of one expert": np.tile([2, E, E], (N, 1)),
        "none": np.full((N, K), E),
    }[loads]
    layout = lay_out_anywhere(experts, E)
    count = int(parts_of(layout, rows))
    assert count == max(1, -(-int(np.sum(experts < E)) // rows))
    x, weights = (jax.device_put(np.asarray(random.standard_normal((N, size)), np.float32)) for size in (5, K))
    factors = jax.device_put(np.asarray(random.standard_normal((E, 5)), np.float32))
    found, sizes = np.zeros(x.shape, np.float32), np.zeros(E, np.int32)
    for number in range(count):
        part = cut(layout, number, rows)
        assert part.pairs_S.size == rows
        owner = np.searchsorted(np.cumsum(part.groups.sizes_E), np.arange(rows), side="right")
        made = np.asarray(there(x, part)) * np.append(factors, np.full((1, 5), np.nan, np.float32), axis=0)[owner]
        found += np.asarray(back(made, part, weights))
        sizes += np.asarray(part.groups.sizes_E)
    np.testing.assert_array_equal(sizes, layout.groups.sizes_E)
    exact = np.einsum("nk,nkd->nd", weights, np.append(factors, np.zeros((1, 5)), axis=0)[experts]) * x
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_a_share_of_rows_that_begin_anywhere_is_an_eighth_more_than_even():
    layout = lay_out_anywhere(np.zeros((2048, 4), np.int32), 8)
    assert rows_of_share(layout, 2) == 2048 * 4 // 2 * 9 // 8
    assert rows_of_share(layout, 7) == -(-2048 * 4 * 9 // (7 * 8 * 8)) * 8
    assert rows_of_share(layout, 1) is None
    assert rows_of_share(lay_out_anywhere(np.zeros((16, 4), np.int32), 8), 2) is None, "no fewer than a kernel takes"

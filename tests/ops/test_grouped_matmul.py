"""The product of rows with the matrix of their group, beside a loop over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.grouped_matmul import Groups, Unaligned, grouped_matmul, grouped_matmul_dw, grouped_matmul_dx

CASES = {
    "one block each": ([4, 4, 4], 4, None),
    "several blocks, one group empty": ([8, 0, 12], 4, [0, 0, 2, 2, 2]),
    "empty rows behind": ([4, 4, 0], 4, [0, 1, 2, 2]),
    "rows": ([1, 3, 0], 1, [0, 1, 1, 1]),
    "one group has all": ([16, 0, 0], 4, [0, 0, 0, 0]),
    "anywhere": ([3, 0, 7], None, None),
    "anywhere, one group has all": ([0, 0, 9], None, None),
}
BEHIND = 2  # rows behind groups that begin anywhere


def drawn(case, dtype=jnp.float32):
    sizes, block, blocks = CASES[case]
    rows = block * (len(blocks) if blocks else len(sizes)) if block else sum(sizes) + BEHIND
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, 6))
    x[sum(sizes) :] = 0
    w = random.standard_normal((len(sizes), 6, 5))
    groups = Groups(
        jax.device_put(np.asarray(sizes, np.int32)),
        None if blocks is None else jax.device_put(np.asarray(blocks, np.int32)),
    )
    if block is None:
        groups = Unaligned(groups.sizes_E)
    owner = np.minimum(np.searchsorted(np.cumsum(sizes), np.arange(rows), side="right"), len(sizes) - 1)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), groups, owner, np.arange(rows) < sum(sizes)


@pytest.mark.parametrize("case", CASES)
def test_every_row_meets_the_matrix_of_its_group(case):
    x, w, groups, owner, used = drawn(case)
    factors = jax.device_put(np.where(used[:, None], np.random.default_rng(1).standard_normal((used.size, 5)), 0))

    def ours(x, w):
        return grouped_matmul(x, w, groups) * factors

    def loop(x, w):
        return jnp.stack([x[i] @ w[owner[i]] for i in range(used.size)]) * factors

    np.testing.assert_allclose(jax.jit(ours)(x, w), jax.jit(loop)(x, w), atol=1e-5)
    slopes = [jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), (0, 1)))(x, w) for f in (ours, loop)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *slopes)


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_themselves_are_those_of_the_product(case):
    x, w, groups, _, used = drawn(case)
    dy = jnp.asarray(np.where(used[:, None], np.random.default_rng(1).standard_normal((used.size, 5)), 0), x.dtype)

    @jax.jit
    def both(x, w, dy):
        _, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, groups), x, w)
        return (grouped_matmul_dx(dy, w, groups), grouped_matmul_dw(x, dy, groups)), pull(dy)

    for a, b in zip(*both(x, w, dy), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_summed_in_float32(case):
    x, w, groups, owner, _ = drawn(case, jnp.bfloat16)
    found = jax.jit(grouped_matmul)(x, w, groups)
    assert found.dtype == jnp.bfloat16
    x, w = jax.device_get((x, w))
    exact = np.stack([np.asarray(x[i], np.float64) @ np.asarray(w[owner[i]], np.float64) for i in range(len(owner))])
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_gathered_matrices_are_not_kept_for_the_backward_pass():
    """What is kept is the rows and the matrices; copies of matrices by block would be larger than both."""
    sizes, blocks = [256, 0, 256], [0] * 64 + [2] * 64
    groups = Groups(jax.device_put(np.asarray(sizes, np.int32)), jax.device_put(np.asarray(blocks, np.int32)))
    _, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, groups), jnp.ones((512, 8)), jnp.ones((3, 8, 8)))
    kept = {x.shape for x in jax.tree.leaves(pull)}
    assert (128, 8, 8) not in kept and (3, 8, 8) in kept


def test_gradients_of_blocks_are_added_as_they_are():
    """Without it a GPU would round each to 10 bits before it adds them."""
    x, w, groups, *_ = drawn("several blocks, one group empty")
    program = str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(grouped_matmul(x, w, groups))))(w))
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 1


def test_refusals():
    x, w, groups, *_ = drawn("rows")
    with pytest.raises(ValueError, match="grouped_matmul: no implementation 'fast'; there are auto, xla, pallas"):
        grouped_matmul(x, w, groups, implementation="fast")
    with pytest.raises(ValueError, match="3 rows are not 4 equal blocks"):
        grouped_matmul(x[:3], w, groups)

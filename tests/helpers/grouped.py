"""Grouped products beside float32: the same questions on a GPU and in jax's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("the product", "the gradient of rows", "the gradient of matrices")


def loads(groups, rows, seed=0):
    """Sizes of groups: even ones, a huge one, many empty, tiny and odd ones, and rows behind them."""
    random = np.random.default_rng(seed)
    even = np.full(groups, rows // groups)
    half = random.multinomial(rows - rows // 2, np.full(groups, 1 / groups))
    half[groups // 3] += rows // 2
    third = np.where(np.arange(groups) % 3 == 1, 0, rows // groups)
    tiny = random.integers(0, 64, groups)
    tiny = np.where(np.cumsum(tiny) <= rows, tiny, 0)
    last = np.zeros(groups, np.int64)
    last[-1] = rows
    cuts = np.sort(random.integers(0, rows + 1, groups))
    return {
        "even": even,
        "one group has half": half,
        "a third is empty": third,
        "tiny": tiny,
        "the last has all": last,
        "nobody has any": np.zeros(groups, np.int64),
        "anywhere": np.diff(cuts, prepend=0),
    }


def drawn(rows, inputs, outputs, groups, seed=0):
    """Rows, matrices and a cotangent, bfloat16."""
    random = np.random.default_rng(seed)
    shapes = (rows, inputs), (groups, inputs, outputs), (rows, outputs)
    return [jax.device_put(np.asarray(random.standard_normal(shape), jnp.bfloat16)) for shape in shapes]


def poisoned(sizes, *arrays):
    """Arrays whose rows behind all groups are not finite."""
    return [a.at[int(np.sum(sizes)) :].set(value) for a, value in zip(arrays, (jnp.nan, jnp.inf), strict=False)]


def exact(x, w, dy, sizes):
    """The product and both gradients, in float64, a group at a time."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for e, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        rows = slice(end - size, end)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    return y, dx, dw


def with_gradients(product):
    """A function of rows, matrices, a cotangent and sizes: the product and both gradients."""

    def run(x, w, dy, sizes):
        y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return y, *pull(dy)

    return run


def assert_rounded(found, exact, name):
    """Sums in float32, rounded to bfloat16 once: half a unit of the last of 8 bits, and what sums lose."""
    found = np.asarray(found, np.float64)
    assert np.all(np.isfinite(found)), name
    scale = np.max(np.abs(exact), initial=1e-30)
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-5 * scale, err_msg=name)

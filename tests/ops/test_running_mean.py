"""The running mean of a document's earlier tokens, beside a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops import running_mean as op

running_mean = jax.jit(op.running_mean, static_argnums=4)

B, T, D = 3, 7, 2


def drawn(seed=0):
    """Rows of documents, padding before, between and after tokens; the last row is padding alone."""
    random = np.random.default_rng(seed)
    x, before = random.standard_normal((B, T, D)), random.standard_normal((B, D))
    starts, valid = random.random((B, T)) < 0.3, random.random((B, T)) < 0.7
    starts[0, 0], valid[0, 0] = False, True  # goes on with the mean before
    starts[1, 0], valid[1, 0] = True, True
    valid[2] = False
    return x, starts, valid, before


def loop(x, starts, valid, before, decay):
    found, mean = np.zeros((B, T, D)), before.copy()
    for b in range(B):
        for t in range(T):
            if starts[b, t] and valid[b, t]:
                mean[b] = 0
            found[b, t] = mean[b]
            if valid[b, t]:
                mean[b] = decay * mean[b] + (1 - decay) * x[b, t]
    return found, mean


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_means_equal_a_loop(seed, decay):
    x, starts, valid, before = drawn(seed)
    expected, last = loop(x, starts, valid, before, decay)
    found, after = running_mean(np.float32(x), starts, valid, np.float32(before), decay)
    assert found.dtype == after.dtype == jnp.float32
    np.testing.assert_allclose(np.where(valid[..., None], found, 0), np.where(valid[..., None], expected, 0), atol=1e-6)
    np.testing.assert_allclose(after, last, atol=1e-6)


def test_one_call_equals_two_with_the_mean_between():
    x, starts, valid, before = drawn()
    x, before = np.float32(x), np.float32(before)
    whole, last = running_mean(x, starts, valid, before, 0.8)
    first, between = running_mean(x[:, :3], starts[:, :3], valid[:, :3], before, 0.8)
    second, after = running_mean(x[:, 3:], starts[:, 3:], valid[:, 3:], between, 0.8)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(after, last, atol=1e-6)


def test_narrow_tokens_are_added_in_float32():
    x = np.full((1, 400, 1), 1.0, jnp.bfloat16)
    nothing = np.zeros((1, 400), bool)
    _, after = running_mean(x, nothing, ~nothing, np.zeros((1, 1), np.float32), 0.99)
    assert float(after[0, 0]) == pytest.approx(1 - 0.99**400, rel=1e-5)


def test_slopes_equal_differences():
    x, starts, valid, before = drawn()
    random = np.random.default_rng(9)
    weights, last_weights = random.standard_normal((B, T, D)), random.standard_normal((B, D))
    weights *= valid[..., None]

    def scalar(x, before):
        found, after = running_mean(x, starts, valid, before, 0.7)
        return jnp.sum(found * np.float32(weights)) + jnp.sum(after * np.float32(last_weights))

    def by_loop(x, before):
        found, after = loop(x, starts, valid, before, 0.7)
        return np.sum(found * weights) + np.sum(after * last_weights)

    slopes = jax.device_get(jax.jit(jax.grad(scalar, (0, 1)))(np.float32(x), np.float32(before)))
    for number, (slope, of) in enumerate(zip(slopes, (x, before), strict=True)):
        for at in np.ndindex(of.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy(), before.copy()]
                moved[number][at] += sign * 1e-4
                ends.append(by_loop(*moved))
            assert float(slope[at]) == pytest.approx((ends[0] - ends[1]) / 2e-4, abs=1e-5)
    assert not np.any(slopes[0][~valid]), "padding has no slope"

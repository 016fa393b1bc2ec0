"""Heads, tokens before them and what a loss of them is asked for."""

import jax
import jax.numpy as jnp
import numpy as np

HEADS = {
    "plain": {},
    "padding and rounds of odd lengths": {"tokens": 203, "words": 300, "chunk_size": 100},
    "all terms": {"words": 290, "label_smoothing": 0.1, "z_loss": 1e-2, "weighted": True},
    "a whole tile of padding": {"words": 250},
    "few tokens": {"tokens": 9},
}


def head(tokens=136, inputs=128, columns=384, words=None, weighted=False, seed=0, **options):
    """Arguments of a loss in float32, and its options."""
    random = np.random.default_rng(seed)
    x = 2 * random.standard_normal((tokens, inputs)) / np.sqrt(inputs)
    kernel = 2 * random.standard_normal((inputs, columns))
    targets = random.integers(0, words or columns, tokens)
    targets[::5] = -1
    x, kernel = (np.asarray(jnp.asarray(each, jnp.bfloat16), np.float32) for each in (x, kernel))
    weights = random.random(tokens).astype(np.float32) if weighted else None
    given = [jax.device_put(each) for each in (x, kernel, targets.astype(np.int32))]
    return [*given, None if weights is None else jax.device_put(weights)], dict(options, vocab_size=words)


def of_loss(loss, dtype, given, options, **more):
    """The loss, what it tells, and the gradients of tokens and head; float64."""
    x, kernel, targets, weights = given

    def run(x, kernel):
        return loss(x, kernel, targets, weights, **options, **more)

    found = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(x.astype(dtype), kernel.astype(dtype))
    return [np.asarray(each, np.float64) for each in jax.tree.leaves(found)]


def assert_near(found, rounded, exact):
    """Sums as in float32, gradients about as near to it as those of XLA."""
    *sums, dx, dkernel = found
    np.testing.assert_allclose(sums, exact[: len(sums)], rtol=2e-5, atol=1e-5)
    for ours, theirs, right in zip((dx, dkernel), rounded[-2:], exact[-2:], strict=True):
        assert np.linalg.norm(ours - right) < 1.1 * np.linalg.norm(theirs - right) < 6e-3 * np.linalg.norm(right)

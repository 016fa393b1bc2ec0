"""The chunked cross-entropy of a linear head against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stellarbyte_jax.ops.cross_entropy import linear_cross_entropy, token_losses


def drawn(*shapes):
    random = np.random.default_rng(3)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_linear_cross_entropy_equals_optax(label_smoothing, z_loss, chunk_size):
    x, kernel = drawn((11, 6), (6, 13))
    targets = jax.device_put(np.int32([3, -1, 0, 12, 5, -1, 7, 7, 1, 2, -1]))

    def ours(x, kernel):
        total, sums = linear_cross_entropy(
            x, kernel, targets, label_smoothing=label_smoothing, z_loss=z_loss, chunk_size=chunk_size
        )
        return 2.5 * total, sums

    def theirs(x, kernel):
        logits = x @ kernel
        with jax.numpy_dtype_promotion("standard"):  # it multiplies with integers inside
            labels = optax.smooth_labels(jax.nn.one_hot(targets, 13), label_smoothing)
        each = optax.softmax_cross_entropy(logits, labels)
        each += z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
        return 2.5 * jnp.sum(jnp.where(targets >= 0, each, 0.0))

    padded = np.pad(kernel, ((0, 0), (0, 3)), constant_values=5.0)

    def of_padded(x, kernel):
        return linear_cross_entropy(
            x, kernel, targets, label_smoothing=label_smoothing, z_loss=z_loss, vocab_size=13, chunk_size=chunk_size
        )[0]

    @jax.jit
    def all_of_it(x, kernel, padded):
        with_slopes = jax.value_and_grad(ours, (0, 1), has_aux=True)(x, kernel)
        theirs_too = jax.value_and_grad(theirs, (0, 1))(x, kernel)
        return with_slopes, theirs_too, ours(x, kernel)[0], jax.value_and_grad(of_padded, 1)(x, padded)

    found = jax.device_get(all_of_it(x, kernel, padded))
    ((value, sums), slopes), (expected, expected_slopes), alone, (total, slope) = found
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
    for a, b in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(2.5 * total, expected, rtol=1e-5)
    np.testing.assert_allclose(2.5 * slope[:, :13], expected_slopes[1], atol=2e-5)
    assert np.all(slope[:, 13:] == 0)
    logits = x @ kernel
    targets = np.asarray(targets)
    real = targets >= 0
    assert float(sums["tokens"]) == real.sum()
    assert float(sums["correct"]) == (logits.argmax(-1) == targets)[real].sum()
    shifted = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    plain = -shifted[real, targets[real]].sum()
    np.testing.assert_allclose(sums["cross_entropy"], plain, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_an_adapter_of_the_head_is_a_part_of_its_matrix(chunk_size):
    """``x kernel + h b`` is one product of ``[x, h]``, and a kernel that is not asked for has no gradient made."""
    given = drawn((11, 6), (11, 2), (2, 13), (6, 13))
    targets = jax.device_put(np.int32([3, -1, 0, 12, 5, -1, 7, 7, 1, 2, -1]))
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "chunk_size": chunk_size}

    def apart(x, h, b, kernel):
        return linear_cross_entropy(x, kernel, targets, low=(h, b), **options)

    def joined(x, h, b, kernel):
        return linear_cross_entropy(jnp.concatenate([x, h], 1), jnp.concatenate([kernel, b]), targets, **options)

    @jax.jit
    def all_of_it(x, h, b, kernel):
        given = x, h, b, kernel
        both = (jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True)(*given) for f in (apart, joined))
        each = token_losses(x, kernel, targets, low=(h, b), chunk_size=chunk_size)
        return *both, each

    ((value, sums), slopes), ((expected, expected_sums), wanted), each = jax.device_get(all_of_it(*given))
    np.testing.assert_allclose([value, *sums.values()], [expected, *expected_sums.values()], rtol=1e-5)
    frozen = jax.jit(jax.grad(lambda *given: apart(*given)[0], (0, 1, 2)))(*given)
    for found, also, slope in zip(slopes, (*frozen, slopes[3]), wanted, strict=True):
        np.testing.assert_allclose(found, slope, atol=2e-5)
        np.testing.assert_array_equal(also, found)
    np.testing.assert_allclose(np.sum(each, axis=1), [sums["cross_entropy"], sums["correct"]], rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_the_gradient_of_a_kernel_is_made_where_it_is_asked_for(trained):
    """Of three products of tokens, matrix and logits two are left; and none of the size of the kernel."""
    x, kernel, targets = jnp.ones((8, 6)), jnp.ones((6, 13)), jnp.zeros(8, jnp.int32)
    slopes = jax.grad(lambda x, kernel: linear_cross_entropy(x, kernel, targets)[0], (0, 1) if trained else 0)
    products = str(jax.make_jaxpr(slopes)(x, kernel)).count("dot_general")
    assert products == (3 if trained else 2)


def test_a_tie_is_no_hit():
    """A kernel whose columns are equal says nothing, and must not seem to be right."""
    x, targets, kernel = np.ones((3, 4), np.float32), np.int32([0, 1, 2]), np.ones((4, 5), np.float32)
    hits = jax.jit(lambda *given: linear_cross_entropy(*given)[1]["correct"])
    assert float(hits(x, kernel, targets)) == 0
    kernel[:, 1] = 2
    assert float(hits(x, kernel, targets)) == 1


def test_logits_beyond_what_an_exponential_can_be():
    """Targets far above all others and far below them, that of token 0 too; and no target among low logits."""
    x, targets = np.eye(4, dtype=np.float32), jax.device_put(np.int32([0, 1, 2, -1]))
    kernel = np.float32([[300.0, 0, 1], [300, 0, 1], [0, 1, 300], [-300, -301, -302]])

    def loss(x, kernel):
        return linear_cross_entropy(x, kernel, targets)[0]

    total, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)
    np.testing.assert_allclose(total, 300, rtol=1e-6)
    right = np.zeros((4, 3))
    right[1] = 1, -1, 0
    np.testing.assert_allclose(slopes[1], right, atol=1e-6)
    np.testing.assert_allclose(slopes[0], right @ kernel.T, atol=1e-3)
    np.testing.assert_allclose(jax.jit(token_losses)(x, kernel, targets)[0], [0, 300, 0, 0], atol=1e-4)


@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_tokens_count_by_their_weights(chunk_size):
    x, kernel = drawn((6, 5), (5, 9))
    targets = jax.device_put(np.int32([3, -1, 0, 8, 5, 5]))
    weights = np.float32([1.0, 7.0, 0.25, 0.0, 0.5, 1.0])

    def ours(x, kernel, weights):
        return linear_cross_entropy(x, kernel, targets, weights, z_loss=0.1, chunk_size=chunk_size)

    def theirs(x, kernel):
        each = -jax.nn.log_softmax(x @ kernel)[jnp.arange(6), targets]
        each += 0.1 * jnp.square(jax.nn.logsumexp(x @ kernel, axis=-1))
        return jnp.sum(jnp.where(targets >= 0, each * weights, 0.0))

    (total, sums), slopes = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(x, kernel, weights)
    expected, expected_slopes = jax.jit(jax.value_and_grad(theirs, (0, 1)))(x, kernel)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for found, slope in zip(slopes, expected_slopes, strict=False):
        np.testing.assert_allclose(found, slope, atol=1e-5)
    assert not np.any(slopes[2]) and float(sums["tokens"]) == 2.75
    hits = np.argmax(x @ kernel, axis=-1) == np.asarray(targets)
    assert float(sums["correct"]) == weights[hits].sum()


@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_losses_of_tokens_are_what_is_summed(chunk_size):
    x, kernel = drawn((6, 5), (5, 9))
    targets = jax.device_put(np.int32([3, -1, 0, 6, 5, 5]))

    def losses(x):
        found = token_losses(x, jax.device_put(kernel), targets, vocab_size=7, chunk_size=chunk_size)
        return found.sum(), found

    (_, found), slope = jax.jit(jax.value_and_grad(losses, has_aux=True))(x)
    scores, targets = (x @ kernel)[:, :7], np.asarray(targets)
    each = (np.log(np.exp(scores).sum(1)) - scores[np.arange(6), targets]) * (targets >= 0)
    np.testing.assert_allclose(found[0], each, rtol=1e-5)
    np.testing.assert_array_equal(found[1], scores.argmax(-1) == targets)
    assert not np.any(slope), "they are for reporting"

"""Do the small operations equal their definitions and their peers?"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stellarbyte_jax.ops.cross_entropy import linear_cross_entropy
from stellarbyte_jax.ops.norm import rms_norm
from stellarbyte_jax.ops.rotary import (
    apply_rotary,
    longest_xpos_row,
    rotary_angles,
    rotary_frequencies,
    scale_pairs,
    xpos_factors,
    xpos_rates,
)


def test_rms_norm_equals_torch():
    torch = pytest.importorskip("torch", reason="the peer of this test")
    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    scale = np.linspace(0.5, 2, 16, dtype=np.float32)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (16,), torch.from_numpy(scale), 1e-3).numpy()
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=1e-3), theirs, atol=1e-6)


def test_rms_norm_rules_differ_only_near_zero():
    one = jnp.ones(8)
    small = jnp.full((1, 8), 1e-4)
    np.testing.assert_allclose(rms_norm(small, one, eps=1e-6, eps_rule="clamp"), small / 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rms_norm(small, one, eps=1e-6), small / np.sqrt(1e-8 + 1e-6), rtol=1e-5)
    with pytest.raises(ValueError, match="'add' or 'clamp'"):
        rms_norm(small, one, eps=1e-6, eps_rule="none")


def rotated_scores(pairing, scale_base=None, T=12, H=8, origin=5, dtype=jnp.float32):
    q = jnp.ones((1, T, 1, H), dtype)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    angles = rotary_angles(positions, rotary_frequencies(H, 100.0))
    scales = [None, None]
    if scale_base is not None:
        factors = partial(xpos_factors, rates_P=xpos_rates(H), scale_base=scale_base)
        scales = [factors(positions - origin), factors(origin - positions)]
    turned_q, turned_k = (apply_rotary(q, angles, pairing=pairing, scale=scale) for scale in scales)
    return np.asarray(jnp.einsum("BTNH,BSNH->TS", turned_q, turned_k, preferred_element_type=jnp.float32))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("scale_base", [None, 4.0])
def test_scores_depend_on_the_distance_only(pairing, scale_base):
    scores = rotated_scores(pairing, scale_base)
    for distance in range(12):
        np.testing.assert_allclose(np.diag(scores, -distance), scores[distance, 0], rtol=1e-4, atol=1e-5)


def test_xpos_is_rope_times_a_decay():
    """Sun et al. 2022, equation 16: pair i at distance d scores zeta_i^(d / base) cos(d theta_i), here with q = k."""
    H, base, theta = 8, 4.0, 100.0
    scores = rotated_scores("half", base, H=H)
    pair = np.arange(0, H, 2) / H
    zeta = (pair + 0.4) / 1.4
    for distance in range(12):
        expected = 2 * np.sum(zeta ** (distance / base) * np.cos(distance * theta**-pair))
        np.testing.assert_allclose(scores[distance, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_xpos_at_a_hundred_thousand_positions(dtype):
    """A query at position 100,000 over keys from 0 on: what is far has decayed, what is near is exact."""
    H, last, base = 64, 100_000, 512.0
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(1, n, 1, H)).astype(np.float32) for n in (1, last + 1))
    q, k = jnp.asarray(q, dtype), jnp.asarray(k, dtype)
    at = jnp.arange(last + 1, dtype=jnp.int32)[None]
    frequencies = rotary_frequencies(H, 10000.0)
    turned_q = apply_rotary(q, rotary_angles(at[:, -1:], frequencies), pairing="half")
    turned_k = apply_rotary(k, rotary_angles(at, frequencies), pairing="half")
    scaled_k = scale_pairs(turned_k, xpos_factors(last - at, xpos_rates(H), scale_base=base), pairing="half")
    scores = np.asarray(jnp.einsum("BTNH,BSNH->TS", turned_q, scaled_k, preferred_element_type=jnp.float32))[0]
    q64, k64 = np.asarray(q, np.float64)[0, 0, 0], np.asarray(k, np.float64)[0, :, 0]
    distance = last - np.arange(last + 1)
    pair = np.arange(H // 2) / (H // 2)
    angle = distance[:, None] * 10000.0**-pair
    decay = ((pair + 0.4) / 1.4) ** (distance[:, None] / base)
    qc, kc = q64[: H // 2] + 1j * q64[H // 2 :], k64[:, : H // 2] + 1j * k64[:, H // 2 :]
    exact = np.sum(decay * np.real(qc * np.conj(kc) * np.exp(1j * angle)), axis=1)
    assert np.all(np.isfinite(scores))
    assert np.abs(scores - exact).max() < (0.3 if dtype == jnp.bfloat16 else 0.1)
    assert np.abs(scores[-1000:] - exact[-1000:]).max() < (0.3 if dtype == jnp.bfloat16 else 0.05)


def test_the_longest_row_of_xpos_is_where_factors_begin_to_be_clipped():
    longest = longest_xpos_row(512.0)
    assert 60_000 < longest < 70_000
    ends = jnp.asarray([[-longest // 2, longest // 2]], jnp.int32)
    rates = xpos_rates(64)
    exponents = np.asarray(jnp.log(xpos_factors(ends, rates, scale_base=512.0)))
    np.testing.assert_allclose(exponents[0, :, 0], [80, -80], rtol=1e-3)
    assert np.isfinite(np.asarray(xpos_factors(100 * ends, rates, scale_base=512.0))).all()


def test_pairings_differ_by_a_permutation_of_channels():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    angles = rotary_angles(jnp.arange(6, dtype=jnp.int32)[None], rotary_frequencies(8, 50.0))
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # half-split channel of each interleaved one
    interleaved = apply_rotary(x[..., order], angles, pairing="interleaved")
    np.testing.assert_allclose(interleaved, apply_rotary(x, angles, pairing="half")[..., order], atol=1e-6)
    scale = jnp.linspace(0.5, 2, 4)[None, None] * jnp.ones((1, 6, 1))
    np.testing.assert_allclose(
        scale_pairs(interleaved, scale, pairing="interleaved"),
        apply_rotary(x, angles, pairing="half", scale=scale)[..., order],
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="'half', 'interleaved' or 'mixed'"):
        apply_rotary(x, angles, pairing="neox")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_linear_cross_entropy_equals_optax(label_smoothing, z_loss, chunk_size):
    keys = jax.random.split(jax.random.key(3), 2)
    x, kernel = jax.random.normal(keys[0], (11, 6)), jax.random.normal(keys[1], (6, 13))
    targets = jnp.asarray([3, -1, 0, 12, 5, -1, 7, 7, 1, 2, -1], jnp.int32)

    def ours(x, kernel):
        total, sums = linear_cross_entropy(
            x, kernel, targets, label_smoothing=label_smoothing, z_loss=z_loss, chunk_size=chunk_size
        )
        return 2.5 * total, sums

    def theirs(x, kernel):
        logits = x @ kernel
        labels = optax.smooth_labels(jax.nn.one_hot(targets, 13), label_smoothing)
        each = optax.softmax_cross_entropy(logits, labels)
        each += z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
        return 2.5 * jnp.sum(jnp.where(targets >= 0, each, 0.0))

    (value, sums), slopes = jax.value_and_grad(ours, (0, 1), has_aux=True)(x, kernel)
    with jax.numpy_dtype_promotion("standard"):
        expected, expected_slopes = jax.value_and_grad(theirs, (0, 1))(x, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(ours(x, kernel)[0], expected, rtol=1e-5)
    for a, b in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    padded = jnp.pad(kernel, ((0, 0), (0, 3)), constant_values=5.0)
    total, slope = jax.value_and_grad(
        lambda kernel: linear_cross_entropy(
            x, kernel, targets, label_smoothing=label_smoothing, z_loss=z_loss, vocab_size=13, chunk_size=chunk_size
        )[0]
    )(padded)
    np.testing.assert_allclose(2.5 * total, expected, rtol=1e-5)
    np.testing.assert_allclose(2.5 * slope[:, :13], expected_slopes[1], atol=2e-5)
    assert np.all(slope[:, 13:] == 0)
    logits = np.asarray(x @ kernel)
    real = np.asarray(targets) >= 0
    assert float(sums["tokens"]) == real.sum()
    assert float(sums["correct"]) == (logits.argmax(-1) == np.asarray(targets))[real].sum()
    shifted = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    plain = -np.asarray(shifted)[real, np.asarray(targets)[real]].sum()
    np.testing.assert_allclose(sums["cross_entropy"], plain, rtol=1e-5)

"""Do the small operations equal their definitions and their peers?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stellarbyte_jax.ops.cross_entropy import linear_cross_entropy
from stellarbyte_jax.ops.norm import rms_norm
from stellarbyte_jax.ops.rotary import apply_rotary, rotary_angles, xpos_scale


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


def rotated_scores(pairing, scale_base=None, T=12, H=8):
    q = jnp.ones((1, T, 1, H))
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    angles = rotary_angles(positions, head_size=H, theta=100.0)
    scale = None if scale_base is None else xpos_scale(positions, head_size=H, scale_base=scale_base, center=5)
    turned_q = apply_rotary(q, angles, pairing=pairing, scale_BTP=scale)
    turned_k = apply_rotary(q, angles, pairing=pairing, scale_BTP=None if scale is None else 1 / scale)
    return np.asarray(jnp.einsum("BTNH,BSNH->TS", turned_q, turned_k))


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


def test_pairings_differ_by_a_permutation_of_channels():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    angles = rotary_angles(jnp.arange(6, dtype=jnp.int32)[None], head_size=8, theta=50.0)
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # half-split channel of each interleaved one
    interleaved = apply_rotary(x[..., order], angles, pairing="interleaved")
    np.testing.assert_allclose(interleaved, apply_rotary(x, angles, pairing="half")[..., order], atol=1e-6)
    with pytest.raises(ValueError, match="'half' or 'interleaved'"):
        apply_rotary(x, angles, pairing="mixed")


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
    logits = np.asarray(x @ kernel)
    real = np.asarray(targets) >= 0
    assert float(sums["tokens"]) == real.sum()
    assert float(sums["correct"]) == (logits.argmax(-1) == np.asarray(targets))[real].sum()
    shifted = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    plain = -np.asarray(shifted)[real, np.asarray(targets)[real]].sum()
    np.testing.assert_allclose(sums["cross_entropy"], plain, rtol=1e-5)

"""The rotation in each pairing of channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.rotary.angles import apply_rotary, rotary_angles, rotary_frequencies, scale_pairs


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


def test_angles_take_the_shape_of_positions_and_frequencies():
    positions = jax.device_put(np.asarray([[0, 1, 5], [2, 3, 4]], np.int32))
    plain = rotary_frequencies(8, 100.0)
    expected = np.asarray(positions)[..., None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(rotary_angles(positions, plain), expected, rtol=1e-6)
    by_row = jnp.stack([plain, 2 * plain])[:, None]
    doubled = expected * np.asarray([1, 2])[:, None, None]
    np.testing.assert_allclose(rotary_angles(positions, by_row), doubled, rtol=1e-6)
    by_head = jnp.stack([positions, positions + 1], axis=2)
    found = rotary_angles(by_head, plain)
    assert found.shape == (2, 3, 2, 4)
    np.testing.assert_allclose(found[:, :, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(rotary_angles(by_head, by_row)[:, :, 0], doubled, rtol=1e-6)

"""XPos is RoPE times a decay with distance, at any length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.rotary.angles import apply_rotary, rotary_angles, rotary_frequencies, scale_pairs
from stellarbyte_jax.ops.rotary.scaling import Scaling
from stellarbyte_jax.ops.rotary.xpos import XPos, longest_xpos_row, xpos_factors, xpos_rates


@partial(jax.jit, static_argnums=(0, 1))
def rotated_scores(pairing, scale_base=None):
    T, H, origin, dtype = 12, 8, 5, jnp.float32
    q = jnp.ones((1, T, 1, H), dtype)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    angles = rotary_angles(positions, rotary_frequencies(H, 100.0))
    scales = [None, None]
    if scale_base is not None:
        factors = partial(xpos_factors, rates_P=xpos_rates(H), scale_base=scale_base)
        scales = [factors(positions - origin), factors(origin - positions)]
    rotated_q, rotated_k = (apply_rotary(q, angles, pairing=pairing, scale=scale) for scale in scales)
    return jnp.einsum("BTNH,BSNH->TS", rotated_q, rotated_k, preferred_element_type=jnp.float32)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("scale_base", [None, 4.0])
def test_scores_depend_on_the_distance_only(pairing, scale_base):
    scores = np.asarray(rotated_scores(pairing, scale_base))
    for distance in range(12):
        np.testing.assert_allclose(np.diag(scores, -distance), scores[distance, 0], rtol=1e-4, atol=1e-5)


def test_xpos_is_rope_times_a_decay():
    """Sun et al. 2022, equation 16: pair i at distance d scores zeta_i^(d / base) cos(d theta_i), here with q = k."""
    H, base, theta = 8, 4.0, 100.0
    scores = np.asarray(rotated_scores("half", base))
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
    q, k = q.astype(dtype), k.astype(dtype)

    @jax.jit
    def scores_of(q, k, at):
        frequencies = rotary_frequencies(H, 10000.0)
        rotated_q = apply_rotary(q, rotary_angles(at[:, -1:], frequencies), pairing="half")
        rotated_k = apply_rotary(k, rotary_angles(at, frequencies), pairing="half")
        scaled_k = scale_pairs(rotated_k, xpos_factors(last - at, xpos_rates(H), scale_base=base), pairing="half")
        return jnp.einsum("BTNH,BSNH->TS", rotated_q, scaled_k, preferred_element_type=jnp.float32)

    scores = np.asarray(scores_of(q, k, np.arange(last + 1, dtype=np.int32)[None]))[0]
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
    ends = np.int32([[-longest // 2, longest // 2]])
    factors = jax.jit(lambda ends: xpos_factors(ends, xpos_rates(64), scale_base=512.0))
    exponents = np.log(np.asarray(factors(ends), np.float64))
    np.testing.assert_allclose(exponents[0, :, 0], [80, -80], rtol=1e-3)
    assert np.isfinite(factors(100 * ends)).all()


def scheme(learnable):
    scaling = Scaling(max_positions=64)
    return XPos(head_size=8, theta=100.0, pairing="half", scaling=scaling, scale_base=2.0, learnable=learnable)


@pytest.mark.parametrize(("factor", "effective"), [(1.0, 1.0), (1.5, 1.5), (2.0, 2.0), (3.0, 2.0)])
def test_learned_rates_are_exact_up_to_twice_the_fastest_and_bounded_there(factor, effective):
    """In the longest row: a score of a pair is its cosine times exp(-rate distance / base), the fastest pair's too."""
    learned = scheme(learnable=True)
    S = learned.longest_row
    assert S == scheme(learnable=False).longest_row // 2
    rates = factor * learned.rates
    fastest = effective * float(learned.rates[0])
    rows = np.arange(S, dtype=np.int32)[None]
    x = np.tile(np.eye(8, dtype=np.float32)[0], (1, S, 1, 1))  # the fastest pair alone

    @jax.jit
    def rotated(rows, x, rates):
        return learned.rotate(learned.frequencies(rows, None, rows >= 0, cached=False), x, x, rows, rows, rates)

    q, k = rotated(rows, x, rates)
    scores = np.einsum("BTNH,BSNH->TS", np.asarray(q, np.float64), np.asarray(k, np.float64))
    distance = np.arange(S)[:, None] - np.arange(S)[None]
    exact = np.exp(-fastest * distance / 2.0) * np.cos(distance.astype(float))
    near = (distance >= 0) & (distance < 20)
    np.testing.assert_allclose(scores[near], exact[near], atol=1e-4)


def test_decay_is_counted_within_the_row_wherever_its_text_goes_on():
    """A row of a text that began 100,000 tokens earlier has the scores of the text's first row."""
    plain = scheme(learnable=False)
    rows = np.arange(40, dtype=np.int32)[None]
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(1, 40, 1, 8)).astype(np.float32) for _ in range(2))

    @jax.jit
    def rotated(q, k, positions, rows):
        frequencies = plain.frequencies(positions, None, positions >= 0, cached=False)
        return plain.rotate(frequencies, q, k, positions, rows, plain.rates)

    def scores(positions):
        return np.tril(np.einsum("BTNH,BSNH->TS", *map(np.asarray, rotated(q, k, positions, rows))))

    later = scores(rows + 100_000)
    assert np.abs(later).max() > 1
    np.testing.assert_allclose(later, scores(rows), atol=0.05)

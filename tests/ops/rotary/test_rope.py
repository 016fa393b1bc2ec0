"""Every position scheme: one row at once and keys out of a cache give the same scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.rotary import Rope, Scaling, StellarByteRope, XPos
from stellarbyte_jax.ops.rotary.rope import document_lengths
from stellarbyte_jax.sharding.ring import dealt_order

H, T = 8, 12
PLAIN = Scaling(max_positions=16)
SCHEMES = {
    "rope": Rope(head_size=H, theta=100.0, pairing="half", scaling=PLAIN),
    "interleaved": Rope(head_size=H, theta=100.0, pairing="interleaved", scaling=PLAIN),
    "yarn": Rope(head_size=H, theta=100.0, pairing="half", scaling=Scaling(max_positions=16, name="yarn", factor=4.0)),
    "dynamic": Rope(
        head_size=H, theta=100.0, pairing="half", scaling=Scaling(max_positions=8, name="dynamic", factor=2.0)
    ),
    "xpos": XPos(head_size=H, theta=100.0, pairing="half", scaling=PLAIN, scale_base=4.0),
    "xpos, dynamic": XPos(
        head_size=H,
        theta=100.0,
        pairing="interleaved",
        scaling=Scaling(max_positions=8, name="dynamic", factor=2.0),
        scale_base=4.0,
    ),
    "stellarbyte": StellarByteRope(head_size=H, theta=100.0, pairing="mixed", scaling=PLAIN, scale_base=4.0),
}


def scores(q_BTNH, k_BSKH):
    return np.asarray(jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSKH))


def arrays(N=2):
    keys = jax.random.split(jax.random.key(0), 2)
    return (jax.random.normal(key, (2, T, N, H)) for key in keys)


@pytest.mark.parametrize("name", SCHEMES)
def test_keys_from_a_cache_score_as_those_of_a_whole_row(name):
    """Slots in any order; with the same positions in every head or not."""
    scheme = SCHEMES[name]
    q, k = arrays()
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T))
    valid = jnp.ones((2, T), bool)
    whole = scheme.frequencies(positions, None, valid, cached=False)
    expected = scores(*scheme.rotate(whole, q, k, positions, positions, scheme.rates))
    # All keys but the last are cached before the last two queries come.
    late = slice(T - 2, T)
    now = scheme.frequencies(positions[:, late], None, valid[:, late], cached=True)
    cached = scheme.to_cache(now, k, positions)
    order = np.random.default_rng(0).permutation(T)
    for heads in (1, 2):
        slots = jnp.repeat(positions[:, order, None], heads, axis=2)
        found = scores(*scheme.from_cache(now, q[:, late], cached[:, order], positions[:, late], slots, scheme.rates))
        np.testing.assert_allclose(found, expected[:, :, late][..., order], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_whether_distances_alone_decide(name):
    scheme = SCHEMES[name]
    q, k = arrays()
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T))
    frequencies = dataclasses.replace(scheme, scaling=PLAIN).frequencies(at, None, jnp.ones((2, T), bool), cached=False)
    a, b = (scores(*scheme.rotate(frequencies, q, k, at + n, at + n, scheme.rates)) for n in (0, 3))
    assert np.allclose(a, b, rtol=1e-3, atol=1e-4) == scheme.relative


def test_queries_belong_to_the_last_of_the_keys():
    for name in ("rope", "xpos", "stellarbyte"):
        scheme = SCHEMES[name]
        q, k = arrays()
        at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T))
        frequencies = scheme.frequencies(at, None, jnp.ones((2, T), bool), cached=False)
        whole = scores(*scheme.rotate(frequencies, q, k, at, at, scheme.rates))
        part = scores(*scheme.rotate(frequencies, q[:, 7:], k, at, at, scheme.rates))
        np.testing.assert_allclose(part, whole[:, :, 7:], rtol=1e-4, atol=1e-5)


def test_how_long_texts_and_rows_may_be():
    assert [(s.max_length, s.longest_row is None) for s in SCHEMES.values()] == [
        (16, True),
        (16, True),
        (16, True),
        (16, True),
        (None, False),
        (None, False),
        (16, True),
    ]
    assert SCHEMES["rope"].rates is None
    short = dataclasses.replace(SCHEMES["xpos"], scale_base=0.05)
    q, k = arrays()
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T))
    frequencies = short.frequencies(at, None, jnp.ones((2, T), bool), cached=False)
    with pytest.raises(ValueError, match=r"12 positions in a row are more than the 6 .* raise xpos_scale_base"):
        short.rotate(frequencies, q, k, at, at, short.rates)
    with pytest.raises(ValueError, match="12 positions in a row are more than the 6 "):
        short.from_cache(frequencies, q, k, at, at[..., None], short.rates)


def test_tokens_that_a_mesh_has_in_another_order_are_rotated_as_in_order():
    """From another middle than that of the row, factors of long rows would be more than floats hold."""
    scheme, order = SCHEMES["xpos"], np.asarray(dealt_order(T, 2))
    q, k = arrays()
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T))
    frequencies = scheme.frequencies(at, None, jnp.ones((2, T), bool), cached=False)
    in_order = scheme.rotate(frequencies, q, k, at, at, scheme.rates)
    dealt = scheme.rotate(frequencies, q[:, order], k[:, order], at[:, order], at[:, order], scheme.rates)
    for one, other in zip(in_order, dealt, strict=True):
        np.testing.assert_allclose(other, one[:, order], rtol=1e-5)


def test_documents_of_tokens_in_another_order_are_as_long():
    positions = jnp.asarray([[20, 21, 22, 0, 1, 2, 3, 0]], jnp.int32)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 3]], jnp.int32)
    order = np.asarray(dealt_order(8, 2))
    valid, rows = jnp.ones((1, 8), bool), jnp.asarray(order[None], jnp.int32)
    expected = document_lengths(positions, ids, valid)
    np.testing.assert_array_equal(expected, [[23, 23, 23, 4, 4, 4, 4, 1]])
    found = document_lengths(positions[:, order], ids[:, order], valid, rows)
    np.testing.assert_array_equal(found, expected[:, order])


def test_document_lengths_count_each_document_to_its_end_in_the_row():
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 0, 0]], jnp.int32)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], jnp.int32)
    valid = jnp.ones((2, 6), bool)
    np.testing.assert_array_equal(document_lengths(positions, ids, valid)[:, :5], [[3, 3, 3, 2, 2], [8, 8, 8, 8, 1]])
    padded = jnp.asarray([[True] * 6, [True, True, True, False, False, False]])
    counted = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (2, 6))
    np.testing.assert_array_equal(document_lengths(counted, None, padded)[:, :3], [[6] * 3, [3] * 3])

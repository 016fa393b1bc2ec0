"""Every position scheme: one row at once and keys out of a cache give the same scores."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.rotary import Rope, Scaling, StellarByteRope, XPos, rope
from stellarbyte_jax.sharding.ring import dealt_order

document_lengths = jax.jit(rope.document_lengths)

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


AT = np.tile(np.arange(T, dtype=np.int32), (2, 1))
VALID = np.ones((2, T), bool)


def scores(q_BTNH, k_BSKH):
    return np.einsum("btnh,bsnh->bnts", np.asarray(q_BTNH), np.asarray(k_BSKH))


def arrays(N=2):
    random = np.random.default_rng(0)
    return (random.standard_normal((2, T, N, H)).astype(np.float32) for _ in range(2))


@partial(jax.jit, static_argnums=0)
def rotated(scheme, q, k, at):
    frequencies = scheme.frequencies(at, None, jnp.ones(at.shape, bool), cached=False)
    return scheme.rotate(frequencies, q, k, at, at, scheme.rates)


@pytest.mark.parametrize("name", SCHEMES)
def test_keys_from_a_cache_score_as_those_of_a_whole_row(name):
    """Slots in any order; with the same positions in every head or not."""
    scheme = SCHEMES[name]
    q, k = arrays()
    expected = scores(*rotated(scheme, q, k, AT))
    # All keys but the last are cached before the last two queries come.
    late = slice(T - 2, T)
    order = np.random.default_rng(0).permutation(T)

    @jax.jit
    def with_cache(q, k, positions):
        now = scheme.frequencies(positions[:, late], None, jnp.ones((2, 2), bool), cached=True)
        cached = scheme.to_cache(now, k, positions)
        slots = (jnp.repeat(positions[:, order, None], heads, axis=2) for heads in (1, 2))
        return [
            scheme.from_cache(now, q[:, late], cached[:, order], positions[:, late], of_heads, scheme.rates)
            for of_heads in slots
        ]

    for found in with_cache(q, k, AT):
        np.testing.assert_allclose(scores(*found), expected[:, :, late][..., order], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_whether_distances_alone_decide(name):
    scheme = SCHEMES[name]
    q, k = arrays()

    @jax.jit
    def moved(q, k, at, by):
        frequencies = dataclasses.replace(scheme, scaling=PLAIN).frequencies(
            at, None, jnp.ones((2, T), bool), cached=False
        )
        return scheme.rotate(frequencies, q, k, at + by, at + by, scheme.rates)

    a, b = (scores(*moved(q, k, AT, np.int32(n))) for n in (0, 3))
    assert np.allclose(a, b, rtol=1e-3, atol=1e-4) == scheme.relative


def test_queries_belong_to_the_last_of_the_keys():
    for name in ("rope", "xpos", "stellarbyte"):
        scheme = SCHEMES[name]
        q, k = arrays()
        whole = scores(*rotated(scheme, q, k, AT))
        part = scores(*rotated(scheme, q[:, 7:], k, AT))
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
    q, k, at = jax.device_put((*arrays(), AT))
    frequencies = short.frequencies(at, None, jax.device_put(VALID), cached=False)
    with pytest.raises(ValueError, match=r"12 positions in a row are more than the 6 .* raise xpos_scale_base"):
        short.rotate(frequencies, q, k, at, at, short.rates)
    with pytest.raises(ValueError, match="12 positions in a row are more than the 6 "):
        short.from_cache(frequencies, q, k, at, at[..., None], short.rates)


def test_tokens_that_a_mesh_has_in_another_order_are_rotated_as_in_order():
    """From another middle than that of the row, factors of long rows would be more than floats hold."""
    scheme, order = SCHEMES["xpos"], np.asarray(dealt_order(T, 2))
    q, k = arrays()

    @jax.jit
    def both(q, k, at):
        frequencies = scheme.frequencies(at, None, jnp.ones((2, T), bool), cached=False)
        in_order = scheme.rotate(frequencies, q, k, at, at, scheme.rates)
        at = at[:, order]
        return in_order, scheme.rotate(frequencies, q[:, order], k[:, order], at, at, scheme.rates)

    in_order, dealt = jax.device_get(both(q, k, AT))
    for one, other in zip(in_order, dealt, strict=True):
        np.testing.assert_allclose(other, one[:, order], rtol=1e-5)


def test_documents_of_tokens_in_another_order_are_as_long():
    positions = np.int32([[20, 21, 22, 0, 1, 2, 3, 0]])
    ids = np.int32([[1, 1, 1, 2, 2, 2, 2, 3]])
    order = np.asarray(dealt_order(8, 2))
    valid, rows = np.ones((1, 8), bool), np.int32(order[None])
    expected = np.asarray(document_lengths(positions, ids, valid))
    np.testing.assert_array_equal(expected, [[23, 23, 23, 4, 4, 4, 4, 1]])
    found = document_lengths(positions[:, order], ids[:, order], valid, rows)
    np.testing.assert_array_equal(found, expected[:, order])


def test_document_lengths_count_each_document_to_its_end_in_the_row():
    positions = np.int32([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 0, 0]])
    ids = np.int32([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
    found = np.asarray(document_lengths(positions, ids, np.ones((2, 6), bool)))
    np.testing.assert_array_equal(found[:, :5], [[3, 3, 3, 2, 2], [8, 8, 8, 8, 1]])
    padded = np.asarray([[True] * 6, [True, True, True, False, False, False]])
    counted = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    np.testing.assert_array_equal(np.asarray(document_lengths(counted, None, padded))[:, :3], [[6] * 3, [3] * 3])

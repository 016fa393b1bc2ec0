"""Does each attention implementation equal the definition, forward and backward, whatever the mask?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_cases import check, forward_and_gradients, inputs
from helpers.numpy_attention import numpy_attention

from stellarbyte_jax.ops.attention import Dropout, attention

IMPLEMENTATIONS = [
    "reference",
    "xla",
    pytest.param("cudnn", marks=pytest.mark.gpu),
    pytest.param("xla", marks=pytest.mark.gpu, id="xla on a GPU"),
]
# Queries and keys are tokens of one row, in order: "aligned" ...
ROWS = {
    "causal": {},
    "grouped": {"K": 2},
    "one key head": {"K": 1},
    "odd length": {"S": 21},
    "window": {"window": 5},
    "window longer than the row": {"window": 500},
    "packed": {"packed": True},
    "packed, odd length": {"packed": True, "S": 21},
    "window, packed, grouped": {"window": 5, "packed": True, "K": 2},
    "window, always visible": {"window": 5, "visible": True},
    "window, always visible, packed, grouped": {"window": 5, "visible": True, "packed": True, "K": 2},
    "queries for the last keys": {"T": 6, "K": 2},
    "window, queries for the last keys": {"T": 6, "window": 5},
    "keys that nobody sees": {"invalid": slice(0, 3)},
    "memory slots, some empty": {"T": 12, "window": 9, "K": 2, "invalid": slice(0, 3)},
    "memory slots, packed": {"T": 12, "packed": True, "window": 9, "K": 2, "invalid": slice(0, 3)},
    "memory slots, every second one": {"T": 12, "window": 9, "visible": True, "invalid": slice(0, 8, 2)},
}
# ... or keys lie in slots in any order, some of them empty.
SLOTS = {
    "slots": {"T": 3},
    "one query": {"T": 1, "K": 2},
    "more queries than keys": {"T": 24, "S": 7},
    "slots, window": {"T": 3, "window": 5, "K": 2},
    "slots, window, always visible": {"T": 3, "window": 5, "visible": True},
    "slots, segments": {"T": 3, "packed": True},
    "slots, some of them invalid": {"T": 3, "invalid": slice(2, 20, 3)},
    "slots that differ by head": {"T": 3, "K": 2, "by_head": True, "window": 9, "visible": True},
}
CASES = {**{name: (True, case) for name, case in ROWS.items()}, **{name: (False, case) for name, case in SLOTS.items()}}
REFUSED = {
    ("xla", "slots that differ by head"): "indices differ from head to head",
    **{("cudnn", name): "not in the order of the row" for name in SLOTS},
    **{("cudnn", name): "a window does not hide" for name in ROWS if "visible" in ROWS[name]},
    **{("cudnn", name): "even number" for name in ROWS if "odd length" in name},
}


jitted = jax.jit(attention, static_argnames=("implementation", "return_weights"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, implementation, request):
    aligned, case = CASES[name]
    on_gpu = "gpu" in request.keywords
    if on_gpu:
        case = {**case, "S": case.get("S", 20) * 6 + case.get("S", 20) % 2, "H": 64, "dtype": "bfloat16"}
    q, k, v, g, mask = inputs(aligned, **case)
    if (implementation, name) in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[implementation, name]):
            attention(q, k, v, mask, implementation=implementation)
        return
    expected = numpy_attention(q, k, v, mask, g)
    g = np.where(expected.sees_BTN[..., None], g, 0)
    options = {"return_weights": implementation == "reference", "return_lse": not on_gpu}
    with jax.numpy_dtype_promotion("standard" if on_gpu else "strict"):  # jax.nn mixes bfloat16 and float32 inside
        found, slopes = forward_and_gradients(q, k, v, g, mask, implementation=implementation, **options)
    check(found, slopes, expected, v.dtype)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("causal", {"softcap": 0.7}),
        ("causal", {"prune_below": 0.3}),
        ("window, always visible, packed, grouped", {"softcap": 2.0, "prune_below": 0.3}),
        ("slots that differ by head", {"softcap": 0.7}),
        ("slots that differ by head", {"softcap": 2.0, "prune_below": 0.3}),
    ],
    ids=str,
)
def test_soft_cap_and_pruning_equal_the_definition(name, options):
    q, k, v, g, mask = inputs(CASES[name][0], **CASES[name][1])
    expected = numpy_attention(q, k, v, mask, g, **options)
    g = np.where(expected.sees_BTN[..., None], g, 0)
    found, slopes = forward_and_gradients(q, k, v, g, mask, return_weights=True, **options)
    check(found, slopes, expected, v.dtype)
    assert np.abs(expected.out - numpy_attention(q, k, v, mask, g).out).max() > 0.05


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_order_of_slots_and_of_queries_does_not_matter(implementation):
    q, k, v, _, mask = jax.device_get(inputs(False, T=6, S=16, window=7, visible=True, packed=False))
    slots, queries = (np.random.default_rng(0).permutation(n) for n in (16, 6))
    plain = np.asarray(jitted(q, k, v, mask, implementation=implementation).out_BTNH)
    moved = dataclasses.replace(
        mask,
        q_positions_BT=mask.q_positions_BT[:, queries],
        k_positions_BSK=mask.k_positions_BSK[:, slots],
        always_visible_BSK=mask.always_visible_BSK[:, slots],
    )
    found = jitted(q[:, queries], k[:, slots], v[:, slots], moved, implementation=implementation).out_BTNH
    np.testing.assert_allclose(found, plain[:, queries], atol=1e-6)


def test_slots_in_order_equal_the_aligned_row():
    q, k, v, _, mask = inputs(True, K=2, window=5, packed=True)
    for implementation in ("reference", "xla"):
        aligned = jitted(q, k, v, mask, implementation=implementation).out_BTNH
        free = jitted(q, k, v, dataclasses.replace(mask, aligned=False), implementation=implementation).out_BTNH
        np.testing.assert_allclose(free, aligned, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_of_a_row_are_independent(implementation):
    q, k, v, _, mask = inputs(True, packed=True)
    second = np.flatnonzero(np.asarray(mask.k_segments_BS[0]) == 3)

    def of_one_document(k):
        out = attention(q, k, v, mask, implementation=implementation).out_BTNH
        return jnp.sum(jnp.square(out[0, second[0] : second[-1] + 1]))

    slope_S = np.abs(np.asarray(jax.jit(jax.grad(of_one_document))(k)))[0].max(axis=(1, 2))
    assert np.all(np.delete(slope_S, second) == 0)
    assert np.all(slope_S[second[:-1]] > 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bfloat16_inputs_keep_a_softmax_in_float32(implementation):
    q, k, v, g, mask = inputs(True, K=2, S=64, window=40, dtype="bfloat16")
    whole = implementation == "reference"
    with jax.numpy_dtype_promotion("strict" if whole else "standard"):  # jax.nn mixes types in its backward pass
        found, slopes = forward_and_gradients(
            q, k, v, g, mask, implementation=implementation, return_weights=whole, return_lse=whole
        )
    expected = numpy_attention(q, k, v, mask, g)
    check(found, slopes, expected, jnp.bfloat16)
    if whole:
        np.testing.assert_allclose(found.lse_BTN, expected.lse_BTN, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "window, always visible, packed, grouped"])
def test_dropout_keeps_the_mean_and_follows_its_key(name):
    q, k, v, _, mask = inputs(True, **CASES[name][1], S=8)
    keys = jax.random.split(jax.random.key(0), 1000)
    dropped = jax.jit(jax.vmap(lambda key: attention(q, k, v, mask, dropout=Dropout(0.3, key)).out_BTNH))(keys)
    dropped = np.asarray(dropped)
    np.testing.assert_allclose(dropped.mean(0), jitted(q, k, v, mask).out_BTNH, atol=0.1)
    assert not np.allclose(dropped[0], dropped[1])
    plain = attention(q, k, v, mask, return_weights=True)
    with_dropout = attention(q, k, v, mask, dropout=Dropout(0.3, keys[0]), return_weights=True)
    np.testing.assert_array_equal(with_dropout.weights_BKGTS, plain.weights_BKGTS)  # told before dropout

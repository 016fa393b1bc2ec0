"""How a tensor of theirs lies here, against what a linear layer computes, and rounding against known neighbours."""

import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH
from ml_dtypes import bfloat16

from stellarbyte_jax.hf.layout import (
    EXPERTS_DOWN,
    EXPERTS_GATE_UP,
    FLAT,
    NEGATED,
    SAME,
    SPLIT_INPUT,
    SPLIT_OUTPUT,
    Layout,
    cast,
    interleaved_to_half,
)

F16, F32, BF16 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(bfloat16)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, "f4")


def test_split_outputs_are_the_outputs_of_a_linear_layer() -> None:
    x_TD, theirs = numbers(5, 6), numbers(12, 6, seed=1)  # [out, in], as torch stores it
    ours_DNH = SPLIT_OUTPUT.from_hf(theirs, (6, 3, 4))
    heads_TNH = np.einsum("TD,DNH->TNH", x_TD, ours_DNH)
    np.testing.assert_allclose(heads_TNH, (x_TD @ theirs.T).reshape(5, 3, 4), rtol=1e-5, atol=1e-6)


def test_split_inputs_are_the_inputs_of_a_linear_layer() -> None:
    heads_TNH, theirs = numbers(5, 3, 4), numbers(6, 12, seed=1)
    ours_NHD = SPLIT_INPUT.from_hf(theirs, (3, 4, 6))
    out_TD = np.einsum("TNH,NHD->TD", heads_TNH, ours_NHD)
    np.testing.assert_allclose(out_TD, heads_TNH.reshape(5, 12) @ theirs.T, rtol=1e-5, atol=1e-6)


def test_a_flat_bias_is_one_for_each_head_and_channel() -> None:
    np.testing.assert_array_equal(FLAT.from_hf(np.arange(6), (2, 3)), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("layout", "ours", "theirs"),
    [
        (SAME, (7, 3), (7, 3)),
        (NEGATED, (7,), (7,)),
        (FLAT, (3, 4), (12,)),
        (FLAT, (12,), (12,)),
        (SPLIT_OUTPUT, (6, 3, 4), (12, 6)),
        (SPLIT_OUTPUT, (6, 5), (5, 6)),
        (SPLIT_INPUT, (3, 4, 6), (6, 12)),
        (SPLIT_INPUT, (5, 6), (6, 5)),
        (EXPERTS_GATE_UP, (3, 6, 2, 4), (3, 8, 6)),
        (EXPERTS_DOWN, (3, 4, 6), (3, 6, 4)),
    ],
)
def test_each_layout_is_undone_and_knows_their_shape(
    layout: Layout, ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    array = numbers(*ours)
    there = layout.to_hf(array)
    assert there.shape == layout.hf_shape(ours) == theirs
    np.testing.assert_array_equal(layout.from_hf(there, ours), array)


def test_interleaved_pairs_become_halves() -> None:
    np.testing.assert_array_equal(interleaved_to_half(np.arange(6)), [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(interleaved_to_half(np.arange(8).reshape(2, 4)), [[0, 2, 1, 3], [4, 6, 5, 7]])


def test_scores_stay_where_the_rotation_of_transformers_takes_over() -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q_TH, k_TH = numbers(7, 8), numbers(7, 8, seed=1)
    angles_TP = np.arange(7, dtype="f4")[:, None] * np.float32([1.0, 0.3, 0.1, 0.02])

    def turned(x_TH: np.ndarray) -> np.ndarray:
        pairs = (x_TH[:, 0::2] + 1j * x_TH[:, 1::2]) * np.exp(1j * angles_TP)
        return np.stack([pairs.real, pairs.imag], -1).reshape(x_TH.shape)

    halves_TH = np.concatenate([angles_TP, angles_TP], -1)
    cos, sin = (torch.from_numpy(f(halves_TH))[None] for f in (np.cos, np.sin))
    q, k = (torch.from_numpy(interleaved_to_half(x))[None, None] for x in (q_TH, k_TH))
    theirs_q, theirs_k = (x[0, 0].numpy() for x in apply_rotary_pos_emb(q, k, cos, sin))
    np.testing.assert_allclose(theirs_q @ theirs_k.T, turned(q_TH) @ turned(k_TH).T, atol=1e-5)


def test_sizes_are_counted_beyond_64_bits() -> None:
    assert FLAT.hf_shape((2**31, 2**31, 2**31)) == (2**93,)


def test_an_array_of_the_right_dtype_is_not_copied() -> None:
    array = numbers(3)
    assert cast(array, F32, "x") is array


@pytest.mark.parametrize(
    ("dtype", "value", "rounded"),
    [
        (BF16, 1 + 2**-8, 1.0),  # half way between 1 and its neighbour 1 + 2^-7: to the even one
        (BF16, 1 + 3 * 2**-8, 1 + 2**-6),
        (BF16, 1 + 2**-8 + 2**-20, 1 + 2**-7),
        (F16, 1 + 2**-11, 1.0),
        (F16, 1 + 3 * 2**-11, 1 + 2**-9),
        (F16, 65519.0, 65504.0),  # the largest number of float16
        (F16, 1e-9, 0.0),
        (F32, 1 + 2**-24, 1.0),
    ],
)
def test_numbers_are_rounded_to_the_nearest(dtype: np.dtype, value: float, rounded: float) -> None:
    found = cast(np.asarray([value, -value]), dtype, "x")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(float), [rounded, -rounded])


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_what_is_not_finite_stays(dtype: np.dtype) -> None:
    found = cast(np.float32([np.inf, -np.inf, np.nan, 2.0]), dtype, "x")
    np.testing.assert_array_equal(found.astype(float), [np.inf, -np.inf, np.nan, 2.0])


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.float32([1, -65520]), F16, r"^a\.b holds -65520, which float16 cannot represent: use float32 or bfloat16$"),
        (np.asarray([1e5], bfloat16), F16, r"^a\.b holds 99840, which float16 cannot represent"),
        (np.float32([np.inf, 3.4e38]), BF16, r"^a\.b holds 3\.4e\+38, which bfloat16 cannot represent"),
        (np.float64([1e300]), F32, r"^a\.b holds 1e\+300, which float32 cannot represent: scale"),
        (np.float64([3.4e38]), BF16, r"^a\.b holds 3\.4e\+38, which bfloat16 cannot represent: use float32$"),
        (
            np.float64([1e300]),
            BF16,
            r"which bfloat16 cannot represent: scale or clip the weights, float32 cannot either$",
        ),
        (
            np.float64([1e300]),
            F16,
            r"which float16 cannot represent: scale or clip the weights, float32 cannot either$",
        ),
    ],
)
def test_a_number_that_would_become_infinite_is_named(array: np.ndarray, dtype: np.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cast(array, dtype, "a.b")

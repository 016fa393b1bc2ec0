"""How one weight of ours lies in a Hugging Face tensor: the arithmetic, and its inverse.

A torch linear layer stores [out, in]; here the inputs come first, and either side may be split into several axes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16


@dataclass(frozen=True)
class Layout:
    """A pair of functions that undo each other, and the foreign shape that a shape of ours becomes."""

    from_hf: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # (their array, our shape) -> our array
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


SAME = Layout(
    from_hf=lambda theirs, shape: theirs,
    to_hf=lambda ours: ours,
    hf_shape=lambda shape: shape,
)
# what is a rate of decay here is one of growth there
NEGATED = Layout(
    from_hf=lambda theirs, shape: -theirs,
    to_hf=lambda ours: -ours,
    hf_shape=lambda shape: shape,
)
# [*out] <-> [out]
FLAT = Layout(
    from_hf=lambda theirs, shape: theirs.reshape(shape),
    to_hf=lambda ours: ours.reshape(-1),
    hf_shape=lambda shape: (_size(shape),),
)
# [in, *out] <-> [out, in]
SPLIT_OUTPUT = Layout(
    from_hf=lambda theirs, shape: theirs.T.reshape(shape),
    to_hf=lambda ours: ours.reshape(ours.shape[0], -1).T,
    hf_shape=lambda shape: (_size(shape[1:]), shape[0]),
)
# [*in, out] <-> [out, in]
SPLIT_INPUT = Layout(
    from_hf=lambda theirs, shape: theirs.T.reshape(shape),
    to_hf=lambda ours: ours.reshape(-1, ours.shape[-1]).T,
    hf_shape=lambda shape: (shape[-1], _size(shape[:-1])),
)

# [E, in, out] <-> [E, out, in]
EXPERTS_DOWN = Layout(
    from_hf=lambda theirs, shape: theirs.swapaxes(1, 2),
    to_hf=lambda ours: ours.swapaxes(1, 2),
    hf_shape=lambda shape: (shape[0], shape[2], shape[1]),
)
# [E, in, 2, out] <-> [E, 2 out, in], all of the gate before all of the up projection
EXPERTS_GATE_UP = Layout(
    from_hf=lambda theirs, shape: theirs.reshape(shape[0], 2, shape[3], shape[1]).transpose(0, 3, 1, 2),
    to_hf=lambda ours: ours.transpose(0, 2, 3, 1).reshape(ours.shape[0], -1, ours.shape[1]),
    hf_shape=lambda shape: (shape[0], 2 * shape[3], shape[1]),
)


def interleaved_to_half(ours: np.ndarray) -> np.ndarray:
    """Reorders the last axis so that rotary pairs (2i, 2i + 1) become (i, i + H/2).

    Applied to queries and keys alike it leaves every score as it was, and the "half" pairing rotates the right pairs.
    """
    return np.concatenate([ours[..., 0::2], ours[..., 1::2]], axis=-1)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds to ``dtype``; no copy where it already has it.

    Raises:
      ValueError: a finite number became infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if dtype.itemsize < array.dtype.itemsize or dtype == np.float16:
        lost = np.isinf(rounded) & np.isfinite(array)
        if lost.any():
            with np.errstate(over="ignore"):
                beyond = np.isinf(array[lost].astype(np.float32)).any()
                bfloat16_too = np.isinf(array[lost].astype(bfloat16)).any()
            raise ValueError(
                f"{name} holds {float(array[lost][0]):g}, which {dtype.name} cannot represent: "
                + (
                    "scale or clip the weights, float32 cannot either"
                    if beyond
                    else f"use float32{'' if bfloat16_too else ' or bfloat16'}"
                )
            )
    return rounded

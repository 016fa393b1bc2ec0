"""Logits as a kernel for Hopper GPUs, with what a cross-entropy needs of them, without another reading.

X tokens, D model, V vocabulary, T tiles of 128 words.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.group_tiles import HALF
from stellarbyte_jax.ops.pallas.grouped_matmul import refusal as refusal_of_product
from stellarbyte_jax.ops.pallas.grouped_rows import Finish, Products, Tuning, grouped_rows

TILE = 128
IMPOSSIBLE = -1e30


class Logits(NamedTuple):
    """Logits, tile by tile.

    Attributes:
      below_XV: how far each is below the largest of its tile, in the dtype of the tokens: what counts in a softmax is
        small, and has been rounded little.
      others_TX: the largest one that is not the target's; float32, as the rest.
      target_TX: the target's, 0 where it is in another tile.
      sums_TX: of the exponentials of logits less the largest.
    """

    below_XV: Float[Array, "X V"]
    others_TX: Float[Array, "T X"]
    target_TX: Float[Array, "T X"]
    sums_TX: Float[Array, "T X"]


def logits(
    x_XD: Float[Array, "X D"], kernel_DV: Float[Array, "D V"], targets_X: Int[Array, " X"], words: int | Array
) -> Logits:
    """Of a head without a bias.

    Args:
      x_XD: tokens; bfloat16 or float16.
      kernel_DV: of the same dtype.
      targets_X: a column of each token; negative or above V for none.
      words: how many columns are words; the others are impossible.

    Raises:
      NotImplementedError: the device or the arrays are not what the kernel is made for; says why.
    """
    if (reason := refusal(x_XD, kernel_DV)) is not None:
        raise NotImplementedError(reason)
    (X, _), V = x_XD.shape, kernel_DV.shape[1]
    T, padded = V // TILE, not isinstance(words, int) or words < V

    def results(products: Products) -> list[tuple[Array, int, int]]:
        value, row, column, tile, given, made = products
        shape = value.shape
        columns = compat.column_numbers(shape) + column
        targets_H = compat.load_by_row(given[0], pl.ds(row, HALF))
        is_target = columns == lax.broadcast_in_dim(targets_H, shape, (0,))
        if padded:
            value = jnp.where(columns < given[1][0], value, IMPOSSIBLE)
        others_H = jnp.max(jnp.where(is_target, IMPOSSIBLE, value), axis=1)
        target_H = jnp.sum(jnp.where(is_target, value, 0.0), axis=1)
        below = value - lax.broadcast_in_dim(jnp.max(value, axis=1), shape, (0,))
        sums_H = jnp.sum(jnp.exp(below), axis=1)
        for ref, found_H in zip(made, (others_H, target_H, sums_H), strict=True):
            compat.store_plain(ref.at[pl.ds(tile * X + row, HALF)], found_H)
        return [(below.astype(x_XD.dtype), 0, 1)]

    of_rows = [jax.ShapeDtypeStruct((T * X,), jnp.float32)] * 3
    given = (targets_X.astype(jnp.int32), jnp.asarray(words, jnp.int32).reshape(1))
    finish = Finish([V], results, given, of_rows, approximate=True)
    sizes_1 = jnp.full(1, X, jnp.int32)
    found = grouped_rows(
        x_XD, kernel_DV[None], sizes_1, transpose=False, tuning=Tuning(TILE, 5, 4), finish=finish, name="logits"
    )
    return Logits(found[0], *(each.reshape(T, X) for each in found[1:]))


def refusal(x_XD: Array | jax.ShapeDtypeStruct, kernel_DV: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernel does not take these; None where it does."""
    D, V = kernel_DV.shape
    if V % TILE:
        return f"the head must have a multiple of {TILE} columns, not {V}"
    return refusal_of_product(x_XD, jax.ShapeDtypeStruct((1, D, V), kernel_DV.dtype))

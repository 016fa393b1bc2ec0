"""Rows of one array in another order, and sums of some rows, as kernels for Hopper GPUs: each row is one copy.

N rows of tokens, K rows that are summed for each, S rows in the other order, D channels.

A row beyond the end of an array is read as zeros, as the copy engine has it: so is the number of rows, which stands
for no row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.pallas import compat

C = 256  # channels of the parts that a row is cut into: a copy has no more along an axis
_AHEAD = 2  # turns that loads are ahead
_BUFFER_BYTES = 32 * 1024
_MOST_BYTES = 200 * 1024  # of shared memory
_MOST_ROWS = 32  # of a buffer


def spread_rows(x_ND: Float[Array, "N D"], rows_NK: Int[Array, "N K"], rows: int) -> Float[Array, "S D"]:
    """The array of so many rows S whose rows ``rows_NK[n]`` are row n of ``x``; no two may be the same.

    What lies in a row that nobody names is anything. Each row of ``x`` is read once, and what is written is not read
    again: to gather the same rows took half as long again, for they do not stay in the cache until their next use.

    Args:
      x_ND: rows.
      rows_NK: numbers of rows of the result; S for none.
      rows: of the result.

    Raises:
      NotImplementedError: the device or the arrays are not what the kernel is made for; says why.
    """
    N, D = x_ND.shape
    K = rows_NK.shape[1]
    if (reason := refusal(x_ND, N * K)) is not None:
        raise NotImplementedError(reason)
    T, slots = _rows(D, N), 2 * _AHEAD  # as many are on their way out

    def body(x: Any, numbers: Any, out: Any, *, buffers: Any, loaded: Any) -> None:
        def start(tile: Array, slot: Array) -> None:
            plgpu.copy_gmem_to_smem(x.at[pl.ds(tile * T, T)], buffers.at[slot], loaded.at[slot])

        def end(tile: Array, slot: Array, turn: Array) -> None:
            del turn
            first = tile * (T * K)
            # All are read before any is needed. Behind the last token there is none.
            found = [numbers[_within(first + at, N * K)] for at in range(T * K)]
            for at, number in enumerate(found):

                @pl.when((number < rows) & (first + at < N * K))
                def _(at: int = at, number: Array = number) -> None:
                    plgpu.copy_smem_to_gmem(buffers.at[slot, at // K], out.at[number], commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        def written() -> None:
            plgpu.wait_smem_to_gmem(_AHEAD - 1, wait_read_only=True)

        _for_tiles(-(-N // T), start, end, loaded, _AHEAD, written)

    scratch = dict(
        buffers=plgpu.SMEM((slots, T, D // C, C), x_ND.dtype),
        loaded=plgpu.Barrier(num_arrivals=1, num_barriers=slots),
    )
    shape = jax.ShapeDtypeStruct((rows, D // C, C), x_ND.dtype)
    run = compat.kernel(body, shape, scratch, name="spread_rows", threads=1)
    return run(x_ND.reshape(N, D // C, C), rows_NK.astype(jnp.int32).reshape(-1)).reshape(rows, D)


def sum_rows(
    y_SD: Float[Array, "S D"], rows_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"] | None, dtype: Any
) -> Float[Array, "N D"]:
    """``sum_k weight_k y[row_k]`` in float32, in the order of k; S is the number of a row of zeros.

    Args:
      y_SD: rows.
      rows_NK: their numbers.
      weights_NK: float32; None: 1.
      dtype: of the result.

    Raises:
      NotImplementedError: the device or the arrays are not what the kernel is made for; says why.
    """
    S, D = y_SD.shape
    N, K = rows_NK.shape
    if (reason := refusal(y_SD, N)) is not None:
        raise NotImplementedError(reason)
    T = max(1, _rows(D, N * K) // K)
    way_out, buffer = 2 * T * D * jnp.dtype(dtype).itemsize, T * K * D * 2
    ahead = min(_AHEAD, (_MOST_BYTES - way_out) // buffer - 1)
    if ahead < 1 or K > _MOST_ROWS:
        raise NotImplementedError(f"{K} rows of {D} channels are too many for the memory of a multiprocessor")

    def body(y: Any, rows: Any, weights: Any, out: Any, *, buffers: Any, sums: Any, loaded: Any) -> None:
        def start(tile: Array, slot: Array) -> None:
            _load(y, rows, tile * (T * K), N * K, buffers.at[slot], loaded.at[slot])

        def end(tile: Array, slot: Array, turn: Array) -> None:
            place = lax.rem(turn, jnp.int32(2))
            numbers = [_within(tile * (T * K) + at, N * K) for at in range(T * K)]
            factors = None if weights_NK is None else [weights[number] for number in numbers]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for token in range(T):
                total = jnp.zeros((D // C, C), jnp.float32)
                for at in range(token * K, (token + 1) * K):
                    row = buffers[slot, at].astype(jnp.float32)
                    total += row if factors is None else row * factors[at]
                sums[place, token] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums.at[place], out.at[pl.ds(tile * T, T)])

        _for_tiles(-(-N // T), start, end, loaded, ahead)

    scratch = dict(
        buffers=plgpu.SMEM((ahead + 1, T * K, D // C, C), y_SD.dtype),
        sums=plgpu.SMEM((2, T, D // C, C), dtype),
        loaded=plgpu.Barrier(num_arrivals=T * K, num_barriers=ahead + 1),
    )
    weights_P = jnp.zeros(1, jnp.float32) if weights_NK is None else weights_NK.astype(jnp.float32).reshape(-1)
    run = compat.kernel(body, jax.ShapeDtypeStruct((N, D // C, C), dtype), scratch, name="sum_rows", threads=1)
    return run(y_SD.reshape(S, D // C, C), rows_NK.astype(jnp.int32).reshape(-1), weights_P).reshape(N, D)


def refusal(x_ND: Array | jax.ShapeDtypeStruct, rows: int) -> str | None:
    """Why the kernels do not move rows of this array to so many; None where they do."""
    D, itemsize = x_ND.shape[1], jnp.dtype(x_ND.dtype).itemsize
    if itemsize != 2:
        return f"rows must be bfloat16 or float16, not {x_ND.dtype}"
    if not D or D % C or D * itemsize > _BUFFER_BYTES:
        return f"rows must have a multiple of {C} channels, and at most {_BUFFER_BYTES // itemsize}, not {D}"
    if not rows:
        return "there are no rows"
    if not compat.runs_here():
        return "the kernels need an NVIDIA Hopper GPU (compute capability 9.0)"
    return None


def _rows(D: int, rows: int) -> int:
    """Of a buffer."""
    return max(1, min(_BUFFER_BYTES // (2 * D), _MOST_ROWS, rows))


def _within(number: Array, count: int) -> Array:
    return jnp.minimum(number, jnp.int32(count - 1))


def _load(x: Any, rows: Any, first: Array, count: int, buffer: Any, arrived: Any) -> None:
    """Starts copies of the rows whose numbers stand from ``first`` on; behind the last one that one again."""
    numbers = [rows[_within(first + at, count)] for at in range(buffer.shape[0])]  # all are read before any is needed
    for at, number in enumerate(numbers):
        plgpu.copy_gmem_to_smem(x.at[number], buffer.at[at], arrived)


def _for_tiles(
    tiles: int,
    start: Callable[[Array, Array], None],
    end: Callable[[Array, Array, Array], None],
    loaded: Any,
    ahead: int,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Loads the tiles of this block some turns ahead, and ends each when it is loaded.

    Args:
      tiles: of all blocks.
      start: starts the loads of a tile to a slot.
      end: of a tile in its slot, and the number of the turn.
      loaded: barriers of the slots.
      ahead: turns.
      written: waits until the slot of the turn that is loaded next is free.
    """
    first, stride = lax.axis_index("sm"), compat.processors()
    slots = loaded.shape[0]
    turns = lax.div(tiles - first + (stride - 1), jnp.int32(stride))

    def begin(turn: Array) -> None:
        @pl.when(turn < turns)
        def _() -> None:
            start(first + turn * stride, lax.rem(turn, jnp.int32(slots)))

    for turn in range(ahead):
        begin(jnp.int32(turn))

    def each(turn: Array, _: None) -> None:
        written()
        begin(turn + ahead)
        slot = lax.rem(turn, jnp.int32(slots))
        plgpu.barrier_wait(loaded.at[slot])
        end(first + turn * stride, slot, turn)

    lax.fori_loop(jnp.int32(0), turns, each, None)
    plgpu.wait_smem_to_gmem(0)

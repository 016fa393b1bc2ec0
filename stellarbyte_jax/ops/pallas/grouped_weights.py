"""The gradient of the matrices of a grouped product, on Hopper's tensor cores: for each group, rows^T rows.

S rows, E groups, D and F the axes of a matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.group_tiles import largest_group
from stellarbyte_jax.ops.pallas.grouped_rows import Tuning
from stellarbyte_jax.ops.pallas.ring import (
    HALF,
    Part,
    by_width,
    drain,
    fill,
    first_column,
    products,
    ring,
    roles,
    store,
    turned,
)

STEP = 64  # rows that a stage of the ring holds
TD = 2 * HALF  # rows of a tile of the result
_ALIGNED = 8  # rows at which copies to memory of several tiles can begin


def grouped_weights(
    x_SD: Float[Array, "S D"], dy_SF: Float[Array, "S F"], sizes_E: Int[Array, " E"], dtype: Any, *, tuning: Tuning
) -> Float[Array, "E D F"]:
    """``x^T dy`` over the rows of each group, summed in float32 in the order of rows; zeros for an empty group.

    Where rows of a group are infinite, what is NaN may be the matrices of the groups beside it too.

    Args:
      x_SD: at least 64 rows, in the order of groups.
      dy_SF: the other factor.
      sizes_E: rows of each group.
      dtype: of the result; two bytes an element.
      tuning: of the kernel.
    """
    (_, D), F, E = x_SD.shape, dy_SF.shape[1], sizes_E.shape[0]
    TF, stages, slots = tuning
    scratch = dict(
        a_smem=compat.swizzled((stages, 2, STEP, HALF), x_SD.dtype),
        b_smem=compat.swizzled((stages, STEP, TF), x_SD.dtype),
        staging=compat.swizzled((2, slots, HALF, 64), dtype),
        **ring(stages, readers=1),
    )

    def body(
        x_gmem: Any,
        dy_gmem: Any,
        sizes: Any,
        out_gmem: Any,
        *,
        a_smem: Any,
        b_smem: Any,
        staging: Any,
        loaded: Any,
        consumed: Any,
    ) -> None:
        def barrier(slot: Array, reader: Array) -> Any:
            return loaded.at[slot + reader * stages]

        def load() -> None:
            def tile(tile: _Tile, done: Array) -> None:
                def copy(k: Array, slot: Array) -> None:
                    arrived = barrier(slot, lax.rem(tile.turn, jnp.int32(2)))
                    rows = pl.ds(tile.first + k * STEP, STEP)
                    for half in range(2):
                        columns = pl.ds(tile.row * TD + half * HALF, HALF)
                        plgpu.copy_gmem_to_smem(x_gmem.at[rows, columns], a_smem.at[slot, half], arrived)
                    columns = pl.ds(first_column(tile.column, F, TF), TF)
                    plgpu.copy_gmem_to_smem(dy_gmem.at[rows, columns], b_smem.at[slot], arrived)

                fill(done, tile.steps, consumed, copy)

            drain(_for_tiles(tile, sizes, (D, F, TF)), consumed)

        def compute() -> None:
            mine = lax.axis_index("wg")

            def tile(tile: _Tile, done: Array) -> None:
                first_clean = jnp.where(tile.skipped > 0, jnp.int32(1), jnp.int32(0))
                clean = first_clean, jnp.maximum(first_clean, lax.div(tile.end, jnp.int32(STEP)))

                def mask(k: Array, slot: Array) -> None:
                    # Rows of the groups around, or whatever lies behind the last one, which may be infinite: zeros in
                    # one factor alone would leave that.
                    rows = tile.skipped - k * STEP, tile.end - k * STEP
                    for half in range(2):
                        _keep_rows(a_smem.at[slot, half], *rows)

                    @pl.when(tile.reaches_end)
                    def _() -> None:
                        for part in range(TF // 64):
                            _keep_rows(b_smem.at[slot, :, pl.ds(part * 64, 64)], *rows)

                    plgpu.commit_smem()

                def of_width(width: int) -> None:
                    def factors(slot: Array) -> list[tuple[Any, Any]]:
                        b = b_smem.at[slot]
                        b = b.at[:, pl.ds(0, width)] if width < TF else b
                        return [(compat.transposed(a_smem.at[slot, half]), b) for half in range(2)]

                    arrived = lambda slot: barrier(slot, mine)  # noqa: E731
                    values = products(done, tile.steps, width, arrived, consumed, factors, mask, clean, count=2)
                    row, column = tile.row * TD, first_column(tile.column, F, TF)
                    parts = [
                        Part(value.astype(dtype), out_gmem.at[tile.group], row + half * HALF, column)
                        for half, value in enumerate(values)
                    ]
                    store(parts, staging.at[mine], staging.at[mine])

                # As in grouped_rows: every other tile.
                pl.when(lax.rem(tile.turn, jnp.int32(2)) == mine)(lambda: by_width(tile.column, F, TF, of_width))

            _for_tiles(tile, sizes, (D, F, TF))
            plgpu.wait_smem_to_gmem(0)

        roles(load, compute)

    out = jax.ShapeDtypeStruct((E, D, F), dtype)
    run = compat.kernel(body, out, scratch, name="grouped_matmul_dw")
    return run(x_SD, dy_SF, sizes_E.astype(jnp.int32))


class _Tile(NamedTuple):
    group: Array
    row: Array
    column: Array
    first: Array  # of the rows that are read: copies begin at multiples of 8
    skipped: Array  # rows of them before the group
    end: Array  # rows of them before the end of the group
    steps: Array
    reaches_end: Array  # whether the last step reads rows that belong to no group
    turn: Array  # number of the tile within its block


def _for_tiles(each: Callable[[_Tile, Array], None], sizes: Any, lengths: tuple[int, int, int]) -> Array:
    """Calls ``each(tile, steps done before)`` for the tiles of this block; returns the steps of all of them.

    Tiles of a group follow each other: what is computed at the same time reads the same rows. Those of the largest
    group go round the blocks; the blocks that its last round leaves out begin with tiles of other groups meanwhile.
    """
    (D, F, TF), E = lengths, sizes.shape[0]
    block, blocks = lax.axis_index("sm"), compat.processors()
    rows, columns = -(-D // TD), -(-F // TF)
    T = rows * columns
    busy = T % blocks or blocks  # blocks with a tile of the last round
    free = blocks - busy
    most = largest_group(sizes, T, blocks)
    largest = lax.div(T - block + (blocks - 1), jnp.int32(blocks))
    begun = most.ahead
    early = jnp.where(block >= busy, lax.div(begun, jnp.int32(max(free, 1))), jnp.int32(0))
    late = lax.div(jnp.maximum((E - 1) * T - begun - block + (blocks - 1), 0), jnp.int32(blocks))

    def turn(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        done, at, before = state
        number = jnp.where(
            i < largest,
            block + i * blocks,
            jnp.where(
                i < largest + early,
                T + (block - busy) + (i - largest) * free,
                T + begun + block + (i - largest - early) * blocks,
            ),
        )
        rank, within = lax.div(number, jnp.int32(T)), lax.rem(number, jnp.int32(T))
        row, column = lax.div(within, jnp.int32(columns)), lax.rem(within, jnp.int32(columns))
        column = turned(rank * rows + row, column, columns)
        # The largest group is the first, the others follow in their own order.
        group = jnp.where(rank <= most.group, rank - 1, rank)
        go_on = lambda state: (state[0] + 1, state[1] + sizes[state[0]])  # noqa: E731
        at, before = lax.while_loop(lambda state: state[0] < group, go_on, (at, before))
        group = jnp.where(rank == 0, most.group, group)
        start = jnp.where(rank == 0, most.first, before)
        size = sizes[group]
        # An empty group has no step, and none to mask.
        skipped = jnp.where(size > 0, lax.rem(start, jnp.int32(_ALIGNED)), jnp.int32(0))
        end = skipped + size
        steps = lax.div(end + (STEP - 1), jnp.int32(STEP))
        reaches_end = start - skipped + steps * STEP > most.rows
        each(_Tile(group, row, column, start - skipped, skipped, end, steps, reaches_end, i), done)
        return done + steps, at, before

    zero = jnp.int32(0)
    done, *_ = lax.fori_loop(zero, largest + early + late, turn, (zero, zero, zero))
    return done


def _keep_rows(block: Any, begin: Array, end: Array) -> None:
    """Zeros in the rows of a matrix in shared memory that are not in [begin, end)."""
    rows = compat.row_numbers(block.shape)
    block[...] = jnp.where((rows >= begin) & (rows < end), block[...], jnp.zeros((), block.dtype))

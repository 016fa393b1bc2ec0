"""Rows times the matrix of their group on Hopper's tensor cores: the products, and the gradient of its rows.

S rows, E groups, K contracted, N columns of the result, T tiles of rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.group_tiles import RowTiles
from stellarbyte_jax.ops.pallas.ring import (
    HALF,
    by_width,
    drain,
    fill,
    finish,
    products,
    ring,
    roles,
    skip,
    turned,
)

STEP = 64  # elements of the contracted axis that a stage of the ring holds: 128 bytes, the widest swizzle


class Tuning(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
      columns: of a tile; a multiple of 64, at most 256.
      stages: of the ring between loads and products.
      alternate: each of the two warpgroups computes every other tile, one while the other writes; else both compute
        half the rows of every tile, which may have twice as many columns then.
    """

    columns: int = 256
    stages: int = 4
    alternate: bool = False


def grouped_rows(
    x_SK: Float[Array, "S K"], w: Float[Array, "E A B"], tiles: RowTiles, *, transpose: bool, tuning: Tuning
) -> Float[Array, "S N"]:
    """Each row times the matrix of its group, or with ``transpose`` times the transposed one; zeros behind the groups.

    Args:
      x_SK: at least 64 rows, in the order of groups.
      w: [E, K, N]; with ``transpose`` [E, N, K]. Its transpose is never made: the tensor cores read it across.
      tiles: of the rows.
      transpose: see above.
      tuning: of the kernel.
    """
    S, K = x_SK.shape
    E, N = w.shape[0], w.shape[1 if transpose else 2]
    TN, stages = tuning.columns, tuning.stages
    scratch = dict(
        a=compat.for_any_rows((stages, 2, HALF, STEP), x_SK.dtype),
        b_smem=compat.swizzled((stages, TN, STEP) if transpose else (stages, STEP, TN), x_SK.dtype),
        # A tile is written whole or cut, never both at once.
        staging=compat.for_any_rows((2, 2, HALF, 64), x_SK.dtype, plgpu.SMEM((2, HALF, 64), x_SK.dtype)),
        **ring(stages, 1 if tuning.alternate else 2),
    )

    def body(
        x_gmem: Any,
        w_gmem: Any,
        table: Any,
        count: Any,
        out_gmem: Any,
        *,
        a: Any,
        b_smem: Any,
        staging: Any,
        loaded: Any,
        consumed: Any,
    ) -> None:
        a_smem, a_copied = compat.both_views(a)
        whole, whole_copied, cut = compat.both_views(staging)

        def barrier(slot: Array, reader: Array) -> Any:
            return loaded.at[slot + reader * stages if tuning.alternate else slot]

        def load() -> None:
            def tile(tile: Tile, done: Array) -> None:
                def copy(k: Array, slot: Array) -> None:
                    arrived = barrier(slot, lax.rem(tile.turn, jnp.int32(2)))
                    inner, outer = pl.ds(k * STEP, STEP), pl.ds(tile.column * TN, TN)
                    for half in range(2):
                        rows = pl.ds(tile.windows[half], HALF)
                        plgpu.copy_gmem_to_smem(x_gmem.at[rows, inner], a_copied.at[slot, half], arrived)
                    part = (outer, inner) if transpose else (inner, outer)
                    plgpu.copy_gmem_to_smem(w_gmem.at[tile.group, *part], b_smem.at[slot], arrived)

                fill(done, tile.steps, consumed, copy)

            drain(for_tiles(tile, table, count, E, K, N, TN), consumed)

        def compute() -> None:
            mine = lax.axis_index("wg")

            def sums(tile: Tile, done: Array, width: int, halves: list[Any]) -> None:
                def factors(slot: Array) -> list[tuple[Any, Any]]:
                    b = b_smem.at[slot]
                    if width < TN:
                        b = b.at[pl.ds(0, width), :] if transpose else b.at[:, pl.ds(0, width)]
                    return [(a_smem.at[slot, half], compat.transposed(b) if transpose else b) for half in halves]

                values = products(
                    done, tile.steps, width, lambda slot: barrier(slot, mine), consumed, factors, count=len(halves)
                )
                for half, value in zip(halves, values, strict=True):
                    window, written = [jnp.where(half == 0, *of) for of in (tile.windows, tile.written)]
                    part = value.astype(out_gmem.dtype), out_gmem, tile.column * TN
                    finish([part], window, written, whole.at[mine], whole_copied.at[mine], cut.at[mine])

            def shared(tile: Tile, done: Array) -> None:
                written = jnp.where(mine == 0, *tile.written)
                mine_only = lambda width: sums(tile, done, width, [mine])  # noqa: E731
                pl.when(written > 0)(lambda: by_width(tile.column, N, TN, mine_only))
                pl.when(written == 0)(lambda: skip(done, tile.steps, loaded, consumed))

            def alternating(tile: Tile, done: Array) -> None:
                for halves in ([0], [0, 1]):
                    is_it = (lax.rem(tile.turn, jnp.int32(2)) == mine) & ((tile.written[1] > 0) == (len(halves) == 2))
                    these = lambda width, halves=halves: sums(tile, done, width, halves)  # noqa: E731
                    pl.when(is_it)(lambda these=these: by_width(tile.column, N, TN, these))

            tile = alternating if tuning.alternate else shared
            for_tiles(tile, table, count, E, K, N, TN)
            plgpu.wait_smem_to_gmem(0)

        roles(load, compute)

    name = "grouped_matmul_dx" if transpose else "grouped_matmul"
    out = jax.ShapeDtypeStruct((S, N), x_SK.dtype)
    return compat.kernel(body, out, scratch, name=name)(x_SK, w, tiles.table_5T, tiles.count_1)


class Tile(NamedTuple):
    """A tile of the result.

    Attributes:
      group: whose matrix its rows have; the number of groups for none.
      column: number of the tile within its rows.
      windows: the first row of each half.
      written: rows of each half that are to be written.
      steps: of the sum; 0 behind the groups.
      turn: number of the tile within its block.
    """

    group: Array
    column: Array
    windows: tuple[Array, Array]
    written: tuple[Array, Array]
    steps: Array
    turn: Array


def for_tiles(each: Callable[[Tile, Array], None], table: Any, count: Any, E: int, K: int, N: int, TN: int) -> Array:
    """Calls ``each(tile, steps done before)`` for the tiles of this block; returns the steps of all of them.

    Tiles of the same rows follow each other, and so do those of the same group: what is computed at the same time reads
    few rows and few matrices.
    """
    first, stride, columns = lax.axis_index("sm"), compat.processors(), -(-N // TN)
    turns = lax.div(count[0] * columns - first + (stride - 1), jnp.int32(stride))

    def turn(i: Array, done: Array) -> Array:
        number = first + i * stride
        row, column = lax.div(number, jnp.int32(columns)), lax.rem(number, jnp.int32(columns))
        column = turned(row, column, columns)
        group, first0, first1, written0, written1 = [table[k, row] for k in range(5)]
        steps = jnp.where(group < E, jnp.int32(-(-K // STEP)), jnp.int32(0))
        # Behind the groups there is no matrix to read, and no step that would read it.
        each(Tile(group, column, (first0, first1), (written0, written1), steps, i), done)
        return done + steps

    return lax.fori_loop(jnp.int32(0), turns, turn, jnp.int32(0))

"""Rows times the matrix of their group on Hopper's tensor cores: the products, and the gradient of its rows.

S rows, E groups, K contracted, N columns of the result, T tiles of rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.group_tiles import Place, first_place, place_of, windows
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
    write_some,
)

STEP = 64  # elements of the contracted axis that a stage of the ring holds: 128 bytes, the widest swizzle


class Tuning(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
      columns: of a tile; a multiple of 64, at most 192.
      stages: of the ring between loads and products.
      slots: for parts of 64 columns of a warpgroup's results on their way out.
    """

    columns: int = 128
    stages: int = 5
    slots: int = 4


class Products(NamedTuple):
    """Products of 64 rows with the columns of a tile.

    Attributes:
      value: [64, n], float32.
      row: the first one.
      column: the first one.
      tile: number of the tile within its rows.
      given: references to what a :class:`Finish` gives besides.
      made: references to what it makes besides.
    """

    value: Array
    row: Array
    column: Array
    tile: Array
    given: Sequence[Any] = ()
    made: Sequence[Any] = ()


class Finish(NamedTuple):
    """What a kernel writes of the products.

    Attributes:
      columns: of each array that it writes, in the dtype of the rows.
      results: of products: what is written [64, m], to which array, and how many columns of the product a column of it
        stands for. What is ``made`` besides it writes itself; its rows may come twice then, with the same bits.
      given: further arrays in global memory.
      made: shapes and dtypes of further results.
      approximate: see ``compat.kernel``.
    """

    columns: list[int]
    results: Callable[[Products], list[tuple[Array, int, int]]]
    given: Sequence[Array] = ()
    made: Sequence[jax.ShapeDtypeStruct] = ()
    approximate: bool = False


def grouped_rows(
    x_SK: Float[Array, "S K"],
    w: Float[Array, "E A B"],
    sizes_E: Int[Array, " E"],
    *,
    transpose: bool,
    tuning: Tuning,
    finish: Finish | None = None,
    name: str = "",
) -> Any:
    """Each row times the matrix of its group, or with ``transpose`` times the transposed one; zeros behind the groups.

    Args:
      x_SK: at least 64 rows, in the order of groups.
      w: [E, K, N]; with ``transpose`` [E, N, K]. Its transpose is never made: the tensor cores read it across.
      sizes_E: rows of each group, at most S in all.
      transpose: see above.
      tuning: of the kernel.
      finish: what is written of the products; None: the products, rounded once.
      name: in profiles; "" for that of a product.

    Returns:
      [S, N] in the dtype of x; or what ``finish`` has.
    """
    S, K = x_SK.shape
    N = w.shape[1 if transpose else 2]
    TN, stages, slots = tuning
    columns, results, given, made, approximate = finish or Finish([N], lambda of: [(of.value.astype(x_SK.dtype), 0, 1)])
    scratch = dict(
        a=compat.for_any_rows((stages, 2, HALF, STEP), x_SK.dtype),
        b_smem=compat.swizzled((stages, TN, STEP) if transpose else (stages, STEP, TN), x_SK.dtype),
        # Of each warpgroup its own half: one may write a whole tile and the other one that is cut.
        staging=compat.for_any_rows((2, slots, HALF, 64), x_SK.dtype),
        **ring(stages, readers=1),
    )

    def body(
        x_gmem: Any,
        w_gmem: Any,
        sizes: Any,
        *others: Any,
        a: Any,
        b_smem: Any,
        staging: Any,
        loaded: Any,
        consumed: Any,
    ) -> None:
        given_gmem, out_gmem = others[: len(given)], others[len(given) :]
        made_gmem = out_gmem[len(columns) :]
        a_smem, a_copied, _ = compat.views(a)
        whole, whole_copied, cut = compat.views(staging)

        def barrier(slot: Array, reader: Array) -> Any:
            return loaded.at[slot + reader * stages]

        def load() -> None:
            def tile(tile: Tile, done: Array) -> None:
                def copy(k: Array, slot: Array) -> None:
                    arrived = barrier(slot, lax.rem(tile.turn, jnp.int32(2)))
                    inner, outer = pl.ds(k * STEP, STEP), pl.ds(first_column(tile.column, N, TN), TN)
                    for half in range(2):
                        rows = pl.ds(tile.windows[half], HALF)
                        plgpu.copy_gmem_to_smem(x_gmem.at[rows, inner], a_copied.at[slot, half], arrived)
                    part = (outer, inner) if transpose else (inner, outer)
                    plgpu.copy_gmem_to_smem(w_gmem.at[tile.group, *part], b_smem.at[slot], arrived)

                fill(done, tile.steps, consumed, copy)

            drain(for_tiles(tile, sizes, (S, K, N, TN)), consumed)

        def compute() -> None:
            mine = lax.axis_index("wg")

            def sums(tile: Tile, done: Array, width: int, halves: list[int]) -> None:
                def factors(slot: Array) -> list[tuple[Any, Any]]:
                    b = b_smem.at[slot]
                    if width < TN:
                        b = b.at[pl.ds(0, width), :] if transpose else b.at[:, pl.ds(0, width)]
                    return [(a_smem.at[slot, half], compat.transposed(b) if transpose else b) for half in halves]

                values = products(
                    done, tile.steps, width, lambda slot: barrier(slot, mine), consumed, factors, count=len(halves)
                )
                column = first_column(tile.column, N, TN)
                parts = [
                    Part(result, out_gmem[which], row, lax.div(column, jnp.int32(share)))
                    for row, value in zip([tile.windows[half] for half in halves], values, strict=True)
                    for result, which, share in results(
                        Products(value, row, column, tile.column, given_gmem, made_gmem)
                    )
                ]
                if len(halves) == 2:  # a group of 64 rows or more: its windows are whole
                    store(parts, whole.at[mine], whole_copied.at[mine])
                else:
                    write_some(parts, tile.written[0], whole.at[mine], whole_copied.at[mine], cut.at[mine, 0])

            def tile(tile: Tile, done: Array) -> None:
                # Each warpgroup computes every other tile, one while the other writes.
                for halves in ([0], [0, 1]):
                    is_it = (lax.rem(tile.turn, jnp.int32(2)) == mine) & ((tile.written[1] > 0) == (len(halves) == 2))
                    these = lambda width, halves=halves: sums(tile, done, width, halves)  # noqa: E731
                    pl.when(is_it)(lambda these=these: by_width(tile.column, N, TN, these))

            for_tiles(tile, sizes, (S, K, N, TN))
            plgpu.wait_smem_to_gmem(0)

        roles(load, compute)

    name = name or ("grouped_matmul_dx" if transpose else "grouped_matmul")
    out = [*(jax.ShapeDtypeStruct((S, each), x_SK.dtype) for each in columns), *made]
    run = compat.kernel(body, out, scratch, name=name, approximate=approximate)
    found = run(x_SK, w, sizes_E.astype(jnp.int32), *given)
    return found[0] if finish is None else found


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


def for_tiles(each: Callable[[Tile, Array], None], sizes: Any, lengths: tuple[int, int, int, int]) -> Array:
    """Calls ``each(tile, steps done before)`` for the tiles of this block; returns the steps of all of them.

    Tiles of the same rows follow each other, and so do those of the same group: what is computed at the same time reads
    few rows and few matrices.

    Args:
      each: what to do.
      sizes: rows of each group, in global memory.
      lengths: rows, contracted elements, columns of the result, of a tile.
    """
    S, K, N, TN = lengths
    E, columns = sizes.shape[0], -(-N // TN)
    first, stride = lax.axis_index("sm"), compat.processors()

    def place(turn: Array, before: Place) -> tuple[Array, Array, Place]:
        row, column = (of(first + turn * stride, jnp.int32(columns)) for of in (lax.div, lax.rem))
        return row, column, place_of(row, before, sizes, S)

    def is_there(state: tuple[Any, ...]) -> Array:
        *_, place = state
        return place.group <= E

    def go_on(state: tuple[Any, ...]) -> tuple[Any, ...]:
        turn, done, row, column, at = state
        steps = jnp.where(at.group < E, jnp.int32(-(-K // STEP)), jnp.int32(0))
        # Behind the groups there is no matrix to read, and no step that would read it.
        each(Tile(at.group, turned(row, column, columns), *windows(row, at), steps, turn), done)
        return turn + 1, done + steps, *place(turn + 1, at)

    zero = jnp.int32(0)
    _, done, *_ = lax.while_loop(is_there, go_on, (zero, zero, *place(zero, first_place(sizes))))
    return done

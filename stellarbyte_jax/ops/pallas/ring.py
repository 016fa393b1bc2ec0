"""A ring of stages in shared memory between the warpgroup that loads and the two that compute, and the way out.

The loader fills a stage when those that read it have consumed what was in it: both others, or one of them, where each
has tiles of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from stellarbyte_jax.ops.pallas import compat

LOADER = 2  # the warpgroup
HALF = 64  # rows of a result that a product of tensor cores makes


def ring(stages: int, readers: int = 2, copies: int = 3) -> dict[str, Any]:
    """The barriers of a ring.

    Args:
      stages: of it.
      readers: warpgroups that read each stage. With 1 each of two has its own barriers for what is loaded for it: it
        must have waited for every time that one of them completes.
      copies: to a stage: two halves of the left factor, and the right one, or more of these.
    """
    return dict(
        loaded=plgpu.Barrier(num_arrivals=copies, num_barriers=stages * (3 - readers)),
        consumed=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    )


def roles(load: Callable[[], None], compute: Callable[[], None]) -> None:
    """What the warpgroups do; those that compute get the registers that loading does not need."""
    is_loader = lax.axis_index("wg") == LOADER

    @pl.when(is_loader)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load()

    @pl.when(jnp.logical_not(is_loader))
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        compute()


def fill(done: Array, steps: Array, consumed: Any, copy: Callable[[Array, Array], None]) -> None:
    """Loads the stages of a tile.

    Args:
      done: steps before this tile.
      steps: of the tile.
      consumed: barriers.
      copy: starts the copies of a step to a stage.
    """
    stages = consumed.shape[0]

    def step(k: Array, _: None) -> None:
        slot = lax.rem(done + k, jnp.int32(stages))

        @pl.when(done + k >= stages)
        def _() -> None:
            plgpu.barrier_wait(consumed.at[slot])

        copy(k, slot)

    lax.fori_loop(jnp.int32(0), steps, step, None)


def drain(steps: Array, consumed: Any) -> None:
    """Waits until the last stages are consumed: a barrier may not go while somebody still arrives at it."""
    stages = consumed.shape[0]

    def wait(step: Array, _: None) -> None:
        plgpu.barrier_wait(consumed.at[lax.rem(step, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def products(
    done: Array,
    steps: Array,
    columns: int,
    loaded: Callable[[Array], Any],
    consumed: Any,
    factors: Callable[[Array], list[tuple[Any, Any]]],
    repair: Callable[[Array, Array], None] | None = None,
    clean: tuple[Array, Array] | None = None,
    count: int = 1,
) -> list[Array]:
    """The sums over a tile's steps of the products of 64 rows with ``columns`` columns, in float32.

    Args:
      done: steps before this tile.
      steps: of the tile; 0 gives zeros.
      columns: of each result.
      loaded: the barrier of a stage.
      consumed: barriers.
      factors: both factors of each product in a stage.
      repair: called with a step and its stage, changes the stage before it is used.
      clean: the first step that needs no repair, and the first one behind it that does.
      count: of products.
    """
    stages = consumed.shape[0]

    def accumulate(*sums: Any) -> list[Array]:
        def step(k: Array, _: None, repaired: bool = False) -> None:
            slot = lax.rem(done + k, jnp.int32(stages))
            plgpu.barrier_wait(loaded(slot))
            if repaired and repair is not None:
                repair(k, slot)
            for total, (left, right) in zip(sums, factors(slot), strict=True):
                plgpu.wgmma(total, left, right)
            plgpu.wgmma_wait(count)  # the products before these have read their stage

            @pl.when(k > 0)
            def _() -> None:
                plgpu.barrier_arrive(consumed.at[lax.rem(done + k - 1, jnp.int32(stages))])

        if clean is None:
            lax.fori_loop(jnp.int32(0), steps, step, None)
        else:
            repaired = lambda k, _: step(k, _, repaired=True)  # noqa: E731
            lax.fori_loop(jnp.int32(0), clean[0], repaired, None)
            lax.fori_loop(*clean, step, None)
            lax.fori_loop(clean[1], steps, repaired, None)
        plgpu.wgmma_wait(0)
        return [total[...] for total in sums]

    values = pl.run_scoped(accumulate, *[plgpu.WGMMAAccumulatorRef((HALF, columns), jnp.float32)] * count)

    @pl.when(steps > 0)
    def _() -> None:
        plgpu.barrier_arrive(consumed.at[lax.rem(done + steps - 1, jnp.int32(stages))])

    return values


def skip(done: Array, steps: Array, loaded: Any, consumed: Any) -> None:
    """Goes through a tile's stages without a product."""
    stages = consumed.shape[0]

    def step(k: Array, _: None) -> None:
        slot = lax.rem(done + k, jnp.int32(stages))
        plgpu.barrier_wait(loaded.at[slot])
        plgpu.barrier_arrive(consumed.at[slot])

    lax.fori_loop(jnp.int32(0), steps, step, None)


def widths(columns: int, width: int) -> list[int]:
    """Columns that the last tiles of a matrix compute, those before them ``width``: together no more than there are.

    What is left behind whole tiles is evened out with the last of these: a narrow tile loads as many rows as a wide one
    for less work.

    Args:
      columns: of the matrix, a multiple of 64.
      width: of a tile.
    """
    left = columns % width
    narrow = (width + left) // 128 * 64
    wide = width + left - narrow
    if columns > width and left and wide < width:
        return [wide, narrow]
    return [left] if left else []


def first_column(column: Array, columns: int, width: int) -> Array:
    """The first column of a tile of a matrix, see :func:`widths`."""
    last = widths(columns, width)
    tiles = -(-columns // width)
    return jnp.where(column == tiles - 1, jnp.int32(columns - (last or [width])[-1]), column * width)


def by_width(column: Array, columns: int, width: int, tile: Callable[[int], None]) -> None:
    """Calls ``tile`` with the columns that a tile computes.

    Args:
      column: number of the tile.
      columns: of the matrix, a multiple of 64.
      width: of a tile.
      tile: to call.
    """
    last, tiles = widths(columns, width), -(-columns // width)
    by_number: dict[int, Array] = {}
    for number, narrow in enumerate(last, tiles - len(last)):
        is_it = column == number
        by_number[narrow] = by_number[narrow] | is_it if narrow in by_number else is_it
    for narrow, is_it in by_number.items():
        pl.when(is_it)(lambda narrow=narrow: tile(narrow))
    if tiles > len(last):
        pl.when(column < tiles - len(last))(lambda: tile(width)) if last else tile(width)


def turned(row: Array, column: Array, columns: int) -> Array:
    """Columns of tiles in an order that goes on by one from turn to turn of the blocks.

    Otherwise a block might get tiles of the same column again and again, and the last column has less to do.

    Args:
      row: number of the row of tiles.
      column: number within it.
      columns: tiles of a row.
    """
    return lax.rem(column + lax.div(row * columns, jnp.int32(compat.processors())), jnp.int32(columns))


class Part(NamedTuple):
    """64 rows of a result.

    Attributes:
      value: [64, 64 n].
      out_gmem: the matrix in global memory.
      row: the first one there.
      column: the first one there.
    """

    value: Array
    out_gmem: Any
    row: Array
    column: Array


def store(parts: list[Part], slots: Any, copied: Any) -> None:
    """Writes to matrices in global memory; what lies behind their end is dropped.

    Args:
      parts: what.
      slots: [n, 64, 64] in shared memory, for 64 columns each on their way.
      copied: the same memory, for copies: see ``compat.for_any_rows``.
    """
    count = slots.shape[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    blocks = [(part, first) for part in parts for first in range(0, part.value.shape[1], 64)]
    for number, (part, first) in enumerate(blocks):
        if number >= count:
            plgpu.wait_smem_to_gmem(count - 1, wait_read_only=True)
        slots[number % count] = part.value[:, first : first + 64]
        plgpu.commit_smem()
        target = part.out_gmem.at[pl.ds(part.row, HALF), pl.ds(part.column + first, 64)]
        plgpu.copy_smem_to_gmem(copied.at[number % count], target)


def store_some(part: Part, count: Array, slot: Any) -> None:
    """Writes the first ``count`` of 64 rows, as runs of 32, 16, ... rows: the copy engine's shapes are constants.

    Args:
      part: what.
      count: of rows, fewer than 64.
      slot: [64, 64] in shared memory, without transforms: others cannot be cut between any two rows.
    """
    value, out_gmem, row, column = part
    for first in range(0, value.shape[1], 64):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        compat.store_plain(slot, value[:, first : first + 64])
        plgpu.commit_smem()
        for bit in range(5, -1, -1):
            run = 1 << bit
            start = lax.bitwise_and(count, jnp.int32(~(2 * run - 1)))

            @pl.when(lax.bitwise_and(count, jnp.int32(run)) != 0)
            def _(run: int = run, start: Array = start, first: int = first) -> None:
                target = out_gmem.at[pl.ds(row + start, run), pl.ds(column + first, 64)]
                plgpu.copy_smem_to_gmem(slot.at[pl.ds(start, run)], target)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def write_some(parts: list[Part], written: Array, slots: Any, copied: Any, cut: Any) -> None:
    """Writes the first ``written`` of 64 rows: see :func:`store` and :func:`store_some`."""

    @pl.when(written == HALF)
    def _() -> None:
        store(parts, slots, copied)

    @pl.when(written < HALF)
    def _() -> None:
        for part in parts:
            store_some(part, written, cut)

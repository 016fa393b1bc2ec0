"""What differs between the versions of jax that are supported, for kernels of Mosaic GPU; and what the device is."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

_H100_PROCESSORS = 132


def transposed(ref: Any) -> Any:
    """A view of a matrix in shared memory with its axes swapped: the tensor cores read it so, nothing is copied."""
    # jax 0.10 knows the method on some references only; later versions deprecate the function.
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def kernel(
    body: Callable[..., None],
    out: Any,
    scratch: Any,
    *,
    name: str,
    threads: int = 3,
    grid: dict[str, int] | None = None,
    approximate: bool = False,
) -> Any:
    """A kernel.

    Args:
      body: gets references to inputs, output and ``scratch``, by position.
      out: shape and dtype of what the kernel returns, or a sequence of these.
      scratch: of shared memory and barriers.
      name: in profiles.
      threads: warpgroups of a block, numbered along ``"wg"``.
      grid: blocks along named axes; None for one persistent block a multiprocessor, numbered along ``"sm"``.
      approximate: whether exponentials are the device's, which are right to 22 bits.
    """
    grid = {"sm": processors()} if grid is None else grid
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="wg",
        kernel_name=name,
        # The default differs between versions. Here every layout is said, none is left to be inferred.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=approximate),
    )


def processors() -> int:
    """Multiprocessors of the device; an H100's where there is no GPU, and a few in the interpreter."""
    if _interpreted:
        return 3
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else _H100_PROCESSORS


def runs_here() -> bool:
    """Whether the device, or the interpreter, runs kernels for Hopper."""
    device = jax.devices()[0]
    return _interpreted or (device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0")


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices as tensor cores read them and as the copy engine writes them: 64 columns a tile."""
    assert jnp.dtype(dtype).itemsize == 2 and shape[-1] % 64 == 0
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def for_any_rows(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for blocks of 64 columns that are copied from or to rows that begin anywhere.

    A copy between ``swizzled`` memory and an array cuts the array into tiles of 8 rows too, and must begin with one of
    them. A block of one tile's width is laid out the same without the tiles.

    Args:
      shape: of the blocks.
      dtype: of two bytes.

    Returns:
      What becomes a sequence of references for :func:`views`.
    """
    blocks = swizzled(shape, dtype)
    assert shape[-1] == 64
    if _interpreted:  # which knows no memory that is shared, and no transforms
        return [blocks]
    copied = plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),))
    return plgpu.RefUnion(blocks, copied, plgpu.SMEM(shape, dtype))


def views(refs: Any) -> tuple[Any, Any, Any]:
    """References of ``for_any_rows`` to the same memory.

    For threads and tensor cores, for copies of whole blocks, and for copies of some rows. The last one has no
    transforms: it does not read what others wrote.
    """
    return (refs[0],) * 3 if _interpreted else tuple(refs)


def store_plain(target: Any, value: jax.Array) -> None:
    """Stores to shared memory without transforms: slowly, for threads collide in its banks."""
    store = getattr(plgpu, "store", None)
    if store is not None:  # from jax 0.12 on, where an ordinary store refuses to be slow
        store(target, value, optimized=False)
    else:
        target[...] = value


_interpreted = False


@contextlib.contextmanager
def interpreted(detect_races: bool = False) -> Iterator[None]:
    """Kernels traced inside run in jax's interpreter, on any device, slowly. Not for several threads.

    Args:
      detect_races: an exception where two warpgroups use memory in no order; needs jax 0.11.
    """
    global _interpreted
    base = "jax._src.pallas.mosaic_gpu.interpret"
    params = importlib.import_module(f"{base}.params")
    _interpreted = True
    try:
        if hasattr(plgpu, "InterpretGPUParams"):
            rules = params.InterpretGPUParams(detect_races=detect_races)
        else:  # jax 0.10, which does not know that the copy engine reads zeros behind the end of an array
            rules = params.InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
        with params.force_gpu_interpret_mode(rules):
            yield
    finally:
        _interpreted = False
        importlib.import_module(f"{base}.interpret_pallas_call").reset_gpu_interpret_mode_state()


def is_interpreted() -> bool:
    """Whether kernels are traced for the interpreter, which lacks some of what a GPU does."""
    return _interpreted


def _load(ref: Any, layout: Any) -> jax.Array:
    """What is in memory, in a layout, whatever that costs."""
    if _interpreted:
        return ref[...]
    how: dict[str, Any] = dict(layout=layout, optimized=False)
    return plgpu.load(ref, (), **how) if jax.__version_info__ < (0, 11) else plgpu.load(ref, **how)


def load_by_row(vector: Any, rows: Any) -> jax.Array:
    """Elements of a vector in global memory, one for each row of a matrix in the tensor cores' layout."""
    return _load(vector.at[rows], plgpu.Layout.WGMMA.reduce(1))


def load_by_column(vector: Any, columns: Any) -> jax.Array:
    """Elements of a vector in global or shared memory, one for each column of a matrix in the tensor cores' layout.

    Two at a time: the first one's number is even, and so is that of the vector's first one in an array of vectors.
    """
    return _load(vector.at[columns], plgpu.Layout.WGMMA.reduce(0))


def column_vector(columns: int) -> jax.Array:
    """The number of each column, as ``load_by_column`` has vectors."""
    if _interpreted:
        return jnp.arange(columns, dtype=jnp.int32)
    return plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=plgpu.Layout.WGMMA.reduce(0))


def load_wide(matrix: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """A matrix in global memory, as ``swizzled`` memory of a dtype takes it: 8 elements at a time."""
    return _load(matrix, plgpu.Layout.SMEM_GMEM_COPY(shape, dtype, 128))


def _by_rows(columns: int) -> Any:
    """The layout of float32 matrices of 64 or 128 columns that are reduced over their rows, 4 or 8 at a time."""
    if columns == 64:
        return plgpu.Layout.TILED(plgpu.Tiling(((8, 64), (2, 64), (4,))), (-5,), (-3, -2), -1)
    assert columns == 128
    return plgpu.Layout.TILED(plgpu.Tiling(((4, 128), (4,))), (-3,), (-2,), -1)


def load_rows(matrix: Any, shape: tuple[int, int]) -> jax.Array:
    """A float32 matrix in global memory, to be reduced over its rows, of which there is a multiple of 8."""
    return _load(matrix, _by_rows(shape[1]))


def for_each_row(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """What was reduced over the rows of a matrix of ``load_rows``, for each of them."""
    found = jax.lax.broadcast_in_dim(vector, shape, (1,))
    return found if _interpreted else plgpu.layout_cast(found, _by_rows(shape[1]))


def numbers_of_rows(shape: tuple[int, int]) -> jax.Array:
    """The number of its row for each element of a matrix, as ``load_rows`` has them."""
    if _interpreted:
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_by_rows(shape[1]))


def zeros_by_row(rows: int) -> jax.Array:
    """float32 zeros, one for each row of a matrix in the tensor cores' layout."""
    zeros = jnp.zeros(rows, jnp.float32)
    return zeros if _interpreted else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))


def row_numbers(shape: tuple[int, ...]) -> jax.Array:
    """The number of its row for each element of a matrix, where the tensor cores' layout has the element."""
    if _interpreted:  # in jax 0.10 the interpreter knows no layouts; in later ones they change nothing
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)


def column_numbers(shape: tuple[int, ...]) -> jax.Array:
    """As :func:`row_numbers`, of its column."""
    if _interpreted:
        return jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def zeros(shape: tuple[int, int]) -> jax.Array:
    """A float32 matrix of zeros in the tensor cores' layout."""
    found = jnp.zeros(shape, jnp.float32)
    return found if _interpreted else plgpu.layout_cast(found, plgpu.Layout.WGMMA)


def products(*factors: tuple[Any, Any]) -> list[jax.Array]:
    """The product of each two matrices in shared memory, in float32; all are begun before the first one is done."""

    def compute(*totals: Any) -> list[jax.Array]:
        for total, (left, right) in zip(totals, factors, strict=True):
            plgpu.wgmma(total, left, right)
        return [total[...] for total in totals]

    shapes = [(left.shape[0], right.shape[1]) for left, right in factors]
    return pl.run_scoped(compute, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes])


def add_products(totals: list[jax.Array], factors: list[tuple[jax.Array, Any]], staging: Any) -> list[jax.Array]:
    """``total + left right`` of each.

    Args:
      totals: float32, in the tensor cores' layout.
      factors: the left one in registers, the right one in shared memory.
      staging: shared memory for a left one, which the interpreter needs; None for a GPU.
    """
    if _interpreted:
        for number, (left, right) in enumerate(factors):
            staging[...] = left
            plgpu.commit_smem()
            (more,) = products((staging, right))
            totals = [*totals[:number], totals[number] + more, *totals[number + 1 :]]
        return totals

    def compute(refs: Any) -> None:
        for ref, (left, right) in zip(refs, factors, strict=True):
            plgpu.wgmma(ref, left, right)

    sums: Any = pl.run_state(compute)([plgpu.WGMMAAccumulatorRef.init(total) for total in totals])
    return list(sums)

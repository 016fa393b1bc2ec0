"""Rows times two matrices of their group and the gate between the products, on Hopper's tensor cores.

For what needs no gradient; see :mod:`stellarbyte_jax.ops.pallas.gated_products` for the rest.

S rows, E groups, K contracted, F columns of each product, H = 2 F.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.activations import value_and_slope
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.group_tiles import HALF
from stellarbyte_jax.ops.pallas.grouped_matmul import refusal as refusal_of_product
from stellarbyte_jax.ops.pallas.grouped_rows import STEP, Tile, for_tiles
from stellarbyte_jax.ops.pallas.ring import (
    Part,
    by_width,
    drain,
    fill,
    first_column,
    products,
    ring,
    roles,
    skip,
    write_some,
)

TF = 128  # columns of a tile of each product
_STAGES = 3
_SLOTS = 5  # for parts of 64 columns of a warpgroup's results on their way out


def gated_rows(
    activation: str,
    x_SK: Float[Array, "S K"],
    w_EKH: Float[Array, "E K H"],
    sizes_E: Int[Array, " E"],
) -> Float[Array, "S F"]:
    """``activation(x G) * (x U)`` with the matrices G and U of each row's group; zeros for rows behind the groups.

    Args:
      activation: of :mod:`stellarbyte_jax.ops.activations`; computed in float32 from the product in the dtype of ``x``.
      x_SK: rows in the order of groups, as :func:`stellarbyte_jax.ops.pallas.grouped_matmul.grouped_matmul` has them.
      w_EKH: G and U side by side.
      sizes_E: rows of each group, at most S in all.

    Raises:
      NotImplementedError: the device or the arrays are not what the kernel is made for; says why.
    """
    if (reason := refusal(x_SK, w_EKH)) is not None:
        raise NotImplementedError(reason)
    (S, K), H = x_SK.shape, w_EKH.shape[2]
    F, dtype = H // 2, x_SK.dtype
    scratch = dict(
        a=compat.for_any_rows((_STAGES, 2, HALF, STEP), dtype),
        gate_smem=compat.swizzled((_STAGES, STEP, TF), dtype),
        up_smem=compat.swizzled((_STAGES, STEP, TF), dtype),
        staging=compat.for_any_rows((2, _SLOTS, HALF, 64), dtype),
        **ring(_STAGES, copies=4),
    )

    def body(
        x_gmem: Any, w_gmem: Any, sizes: Any, out_gmem: Any, *, a: Any, gate_smem: Any, up_smem: Any,
        staging: Any, loaded: Any, consumed: Any,
    ) -> None:  # fmt: skip
        a_smem, a_copied, _ = compat.views(a)
        whole, whole_copied, cut = compat.views(staging)

        def load() -> None:
            def tile(tile: Tile, done: Array) -> None:
                def copy(k: Array, slot: Array) -> None:
                    inner = pl.ds(k * STEP, STEP)
                    for half in range(2):
                        rows = pl.ds(tile.windows[half], HALF)
                        plgpu.copy_gmem_to_smem(x_gmem.at[rows, inner], a_copied.at[slot, half], loaded.at[slot])
                    for first, target in ((0, gate_smem), (F, up_smem)):
                        part = inner, pl.ds(first + first_column(tile.column, F, TF), TF)
                        plgpu.copy_gmem_to_smem(w_gmem.at[tile.group, *part], target.at[slot], loaded.at[slot])

                fill(done, tile.steps, consumed, copy)

            drain(for_tiles(tile, sizes, (S, K, F, TF)), consumed)

        def compute() -> None:
            mine = lax.axis_index("wg")

            def tile(tile: Tile, done: Array) -> None:
                window, written = (jnp.where(mine == 0, *of) for of in (tile.windows, tile.written))
                column = first_column(tile.column, F, TF)

                def of_width(width: int) -> None:
                    def factors(slot: Array) -> list[tuple[Any, Any]]:
                        left = a_smem.at[slot, mine]
                        return [(left, right.at[slot].at[:, pl.ds(0, width)]) for right in (gate_smem, up_smem)]

                    gate, up = (
                        value.astype(dtype)
                        for value in products(
                            done, tile.steps, width, lambda slot: loaded.at[slot], consumed, factors, count=2
                        )
                    )
                    active, _ = value_and_slope(activation, gate.astype(jnp.float32))
                    h = (active * up.astype(jnp.float32)).astype(dtype)
                    part = Part(h, out_gmem, window, column)
                    write_some([part], written, whole.at[mine], whole_copied.at[mine], cut.at[mine, 0])

                pl.when(written > 0)(lambda: by_width(tile.column, F, TF, of_width))
                pl.when(written == 0)(lambda: skip(done, tile.steps, loaded, consumed))

            for_tiles(tile, sizes, (S, K, F, TF))
            plgpu.wait_smem_to_gmem(0)

        roles(load, compute)

    run = compat.kernel(body, jax.ShapeDtypeStruct((S, F), dtype), scratch, name="gated_rows")
    return run(x_SK, w_EKH, sizes_E.astype(jnp.int32))


def refusal(x_SK: Array | jax.ShapeDtypeStruct, w_EKH: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernel does not take these; None where it does."""
    if w_EKH.shape[2] % 128:
        return f"each product must have a multiple of 64 columns, not {w_EKH.shape[2] / 2:g}"
    return refusal_of_product(x_SK, w_EKH)

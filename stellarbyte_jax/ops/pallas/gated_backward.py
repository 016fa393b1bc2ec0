"""The backward pass of gated rows as a kernel for Hopper GPUs: all of it in one reading of what it needs.

S rows, F inside an expert, H = 2 F.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from stellarbyte_jax.ops.activations import value_and_slope
from stellarbyte_jax.ops.pallas import compat

M = 64  # rows and columns of the parts that are computed at once
_WARPGROUPS = 3  # each has parts of its own
_SLOTS = 3  # for parts of a warpgroup: one is loaded, one computed, one on its way out


def gated_backward(
    activation: str,
    both_SH: Float[Array, "S H"],
    dh_SF: Float[Array, "S F"],
    weights_S: Float[Array, " S"],
    *,
    woven: bool = False,
) -> tuple[Float[Array, "S H"], Float[Array, "S F"], Float[Array, " S"]]:
    """For ``h = activation(g) u`` and the cotangent ``dh`` of rows whose weight is 1.

    Args:
      activation: of :mod:`stellarbyte_jax.ops.activations`.
      both_SH: g and u side by side; bfloat16 or float16.
      dh_SF: in the dtype of these.
      weights_S: float32, of rows.
      woven: whether every 64 columns of g stand before the same ones of u in ``both_SH`` and in its cotangent, as
        :mod:`stellarbyte_jax.ops.pallas.gated_products` has them.

    Returns:
      The cotangents of g and u for ``weight dh``; ``weight h``; and ``dh . h`` of each row, float32.

    Raises:
      NotImplementedError: the device or the arrays are not what the kernel is made for; says why.
    """
    S, F = dh_SF.shape
    if (reason := refusal(dh_SF)) is not None:
        raise NotImplementedError(reason)
    tiles, parts, dtype = -(-S // M), F // M, dh_SF.dtype

    def body(
        both: Any, dh: Any, weights: Any, dboth: Any, weighted: Any, slopes: Any, *, buffers: Any, loaded: Any
    ) -> None:
        worker = lax.axis_index("sm") + lax.axis_index("wg") * compat.processors()
        workers = compat.processors() * _WARPGROUPS
        first_slot = lax.axis_index("wg") * _SLOTS
        turns = lax.div(tiles - worker + (workers - 1), jnp.int32(workers))  # tiles of this warpgroup

        def slot_of(turn: Array, part: Array) -> Array:
            return first_slot + lax.rem(turn * parts + part, jnp.int32(_SLOTS))

        def where(turn: Array, part: Array) -> list[tuple[Any, Any, Any]]:
            """Of each of the three in a slot: the array it comes from, the one it goes to, and the place in both."""
            rows = pl.ds((worker + turn * workers) * M, M)
            own = pl.ds(part * M, M)
            gate, up = (
                (pl.ds(2 * part * M, M), pl.ds((2 * part + 1) * M, M)) if woven else (own, pl.ds(F + part * M, M))
            )
            return [(both, dboth, (rows, gate)), (both, dboth, (rows, up)), (dh, weighted, (rows, own))]

        def load(turn: Array, part: Array) -> None:
            @pl.when(turn < turns)
            def _() -> None:
                slot = slot_of(turn, part)
                for which, (source, _, place) in enumerate(where(turn, part)):
                    plgpu.copy_gmem_to_smem(source.at[place], buffers.at[slot, which], loaded.at[slot])

        load(jnp.int32(0), jnp.int32(0))

        def tile(turn: Array, _: None) -> None:
            rows = pl.ds((worker + turn * workers) * M, M)
            weight_M = compat.load_by_row(weights, rows)
            weight_MM = lax.broadcast_in_dim(weight_M, (M, M), (0,))

            def step(part: Array, slope_M: Array) -> Array:
                # The slot of the next part has been on its way out for longest.
                plgpu.wait_smem_to_gmem(_SLOTS - 2, wait_read_only=True)
                is_last = part == parts - 1
                load(jnp.where(is_last, turn + 1, turn), jnp.where(is_last, jnp.int32(0), part + 1))
                slot = slot_of(turn, part)
                plgpu.barrier_wait(loaded.at[slot])
                gate, up, dh_MM = (buffers[slot, which].astype(jnp.float32) for which in range(3))
                active, slope = value_and_slope(activation, gate)
                h = active * up
                dh_weighted = dh_MM * weight_MM
                for which, value in enumerate((dh_weighted * up * slope, dh_weighted * active, h * weight_MM)):
                    buffers[slot, which] = value.astype(dtype)
                plgpu.commit_smem()
                for which, (_, target, place) in enumerate(where(turn, part)):
                    plgpu.copy_smem_to_gmem(buffers.at[slot, which], target.at[place], commit_group=False)
                plgpu.commit_smem_to_gmem_group()
                return slope_M + jnp.sum(dh_MM * h, axis=1)

            slope_M = lax.fori_loop(jnp.int32(0), jnp.int32(parts), step, compat.zeros_by_row(M))
            compat.store_plain(slopes.at[rows], slope_M)

        lax.fori_loop(jnp.int32(0), turns, tile, None)
        plgpu.wait_smem_to_gmem(0)

    scratch = dict(
        buffers=compat.swizzled((_WARPGROUPS * _SLOTS, 3, M, M), dtype),
        loaded=plgpu.Barrier(num_arrivals=3, num_barriers=_WARPGROUPS * _SLOTS),
    )
    out = (
        jax.ShapeDtypeStruct(both_SH.shape, dtype),
        jax.ShapeDtypeStruct(dh_SF.shape, dtype),
        jax.ShapeDtypeStruct((tiles * M,), jnp.float32),
    )
    weights_S = jnp.pad(weights_S.astype(jnp.float32), (0, tiles * M - S))
    run = compat.kernel(body, out, scratch, name="gated_backward", threads=_WARPGROUPS)
    dboth_SH, weighted_SF, slopes_S = run(both_SH, dh_SF, weights_S)
    return dboth_SH, weighted_SF, slopes_S[:S]


def refusal(dh_SF: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernel does not take such cotangents; None where it does."""
    S, F = dh_SF.shape
    if dh_SF.dtype not in (jnp.bfloat16, jnp.float16):
        return f"rows must be bfloat16 or float16, not {dh_SF.dtype}"
    if F % M or not F:
        return f"rows must have a multiple of {M} channels, not {F}"
    if S % 8 or not S:
        return f"rows must be a multiple of 8, not {S}"
    if not compat.runs_here():
        return "the kernels need an NVIDIA Hopper GPU (compute capability 9.0)"
    return None

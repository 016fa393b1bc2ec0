"""Attention over the keys that tiles of queries see, on Hopper's tensor cores.

Dao et al. 2022, https://arxiv.org/abs/2205.14135; the turns of the two warpgroups: Shah et al. 2024,
https://arxiv.org/abs/2407.08608. B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.flash import HIDDEN, LOG2E, Visible, capped, in_three, padded, whole_steps
from stellarbyte_jax.ops.pallas.ring import LOADER
from stellarbyte_jax.ops.pallas.seen_keys import HALF, Seen, key_ranges

TILE = 128  # keys
_STAGES = 2
_ROWS = 2 * HALF


def flash_forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    seen: Seen,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention and the log-sum-exp of scores, float32.

    Args:
      q_BTNH: queries; bfloat16 or float16, H a multiple of 64 up to 128.
      k_BSKH: keys.
      v_BSKH: values.
      seen: what sees what.
      softcap: replaces scores s by ``softcap * tanh(s / softcap)``.
    """
    (B, T, N, H), K, dtype = q_BTNH.shape, k_BSKH.shape[2], q_BTNH.dtype
    Q, scale = -(-T // _ROWS), H**-0.5
    vectors = [padded(seen.first_BT, _ROWS)]
    if seen.kinds_BS is not None:
        vectors += [padded(seen.document_BT, _ROWS), padded(seen.kinds_BS, TILE)]
    scratch: dict[str, Any] = dict(
        q_smem=compat.swizzled((2, HALF, H), dtype),
        kv_smem=compat.swizzled((2, _STAGES, TILE, H), dtype),
        q_loaded=plgpu.Barrier(num_barriers=2),
        loaded=plgpu.Barrier(num_barriers=2 * _STAGES),  # of keys, then of values
        consumed=plgpu.Barrier(num_arrivals=2, num_barriers=2 * _STAGES),
        turns=plgpu.Barrier(num_arrivals=2),
    )
    if compat.is_interpreted():
        scratch["staging"] = compat.swizzled((2, HALF, TILE), dtype)

    def body(
        q: Any, k: Any, v: Any, table: Any, *rest: Any, q_smem: Any, kv_smem: Any, q_loaded: Any, loaded: Any,
        consumed: Any, turns: Any, staging: Any = None,
    ) -> None:  # fmt: skip
        *of_keys, out, lse = rest
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        # The longest ones first: the last queries see most keys.
        number = Q - 1 - lax.axis_index("tile")
        pinned, pinned_end, first, end, *most = [table[n, batch, number] for n in range(6)]
        pins = pinned_end - pinned
        steps = pins + end - first

        def key_of(step: Array) -> Array:
            return jnp.where(step < pins, pinned + step, first + step - pins) * TILE

        def slot_of(step: Array, which: int) -> Array:
            return which * _STAGES + lax.rem(step, jnp.int32(_STAGES))

        @pl.when(lax.axis_index("wg") == LOADER)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def wait(step: Array, which: int) -> None:
                plgpu.barrier_wait(consumed.at[slot_of(step, which)])

            def load(step: Array, _: None) -> None:
                place = batch, pl.ds(key_of(step), TILE), lax.div(head, jnp.int32(N // K))
                for which, source in enumerate((k, v)):
                    pl.when(step >= _STAGES)(lambda which=which: wait(step, which))
                    target = kv_smem.at[which, lax.rem(step, jnp.int32(_STAGES))]
                    plgpu.copy_gmem_to_smem(source.at[place], target, loaded.at[slot_of(step, which)])

            def end(step: Array, _: None) -> None:
                for which in range(2):
                    wait(step, which)

            lax.fori_loop(jnp.int32(0), steps, load, None)
            # A barrier may not go while somebody still arrives at it.
            lax.fori_loop(jnp.maximum(steps - _STAGES, 0), steps, end, None)

        @pl.when(lax.axis_index("wg") != LOADER)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            mine = lax.axis_index("wg")
            row = number * _ROWS + mine * HALF
            rows, query = pl.ds(row, HALF), row + seen.offset
            mine_q = q_smem.at[mine]
            plgpu.copy_gmem_to_smem(q.at[batch, rows, head], mine_q, q_loaded.at[mine])
            visible = Visible(seen, of_keys, batch, rows, query, (HALF, TILE))
            plgpu.barrier_wait(q_loaded.at[mine])

            def change() -> None:
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(turns)

            def step(step: Array, carried: Any, is_masked: bool) -> Any:
                total, most_H, sum_H = carried
                keys, values = (kv_smem.at[which, lax.rem(step, jnp.int32(_STAGES))] for which in range(2))
                plgpu.barrier_wait(loaded.at[slot_of(step, 0)])

                def products(ref: Any) -> Array:
                    plgpu.wgmma(ref, mine_q, compat.transposed(keys))
                    change()
                    return ref[...]

                scores = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((HALF, TILE), jnp.float32))
                plgpu.barrier_arrive(consumed.at[slot_of(step, 0)])
                factor = scale * LOG2E
                if softcap is not None:
                    (scores, _), factor = capped(scores, scale, softcap), LOG2E
                if is_masked:
                    scores = jnp.where(visible.mask(key_of(step)), scores, HIDDEN)
                new_H = jnp.maximum(most_H, jnp.max(scores, axis=1) * factor)
                # A query that has seen no key yet: its hidden scores less themselves need not be 0 where a product and
                # a difference are one operation.
                base_H = jnp.where(new_H > HIDDEN / 100, new_H, 0.0)
                shrink_H = jnp.exp2(most_H - base_H)
                weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(base_H, scores.shape, (0,)))
                total = total * lax.broadcast_in_dim(shrink_H, total.shape, (0,))
                sum_H = sum_H * shrink_H + jnp.sum(weights, axis=1)
                # The other warpgroup's turn on the tensor cores begins when all of this is done.
                total, new_H, sum_H, narrow = lax.optimization_barrier((total, new_H, sum_H, weights.astype(dtype)))
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(loaded.at[slot_of(step, 1)])
                plgpu.barrier_wait(turns)
                place = None if staging is None else staging.at[mine]
                (total,) = compat.add_products([total], [(narrow, values)], place)
                plgpu.barrier_arrive(consumed.at[slot_of(step, 1)])
                return total, new_H, sum_H

            nothing = compat.zeros((HALF, H)), compat.zeros_by_row(HALF) + HIDDEN, compat.zeros_by_row(HALF)
            bounds = whole_steps(seen, jnp.where(mine == 0, *most), query, first, pins, steps, TILE)
            pl.when(mine == 1)(change)
            total, most_H, sum_H = in_three(step, nothing, bounds)
            pl.when(mine == 0)(change)
            sum_H = jnp.where(sum_H > 0, sum_H, 1.0)
            mine_q[...] = (total * lax.broadcast_in_dim(1 / sum_H, total.shape, (0,))).astype(dtype)
            compat.store_plain(lse.at[batch, head, rows], most_H / LOG2E + jnp.log(sum_H))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine_q, out.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

    shapes = jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, Q * _ROWS), jnp.float32)
    grid = {"head": N, "tile": Q, "batch": B}
    run = compat.kernel(body, shapes, scratch, name="attention", grid=grid, approximate=True)
    out_BTNH, lse_BNT = run(q_BTNH, k_BSKH, v_BSKH, key_ranges(seen, TILE), *vectors)
    return out_BTNH, lse_BNT[:, :, :T]

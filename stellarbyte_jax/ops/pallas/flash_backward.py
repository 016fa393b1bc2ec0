"""Gradients of attention on Hopper's tensor cores: of queries by tiles of queries, of keys and values by tiles of keys.

Each sum is of one block, in a fixed order. B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.flash import LOG2E, Visible, are_seen, capped, in_three, padded, up_to, whole_steps
from stellarbyte_jax.ops.pallas.ring import LOADER, drain, fill
from stellarbyte_jax.ops.pallas.seen_keys import HALF, Seen, key_ranges, query_ranges

TILE = 64  # keys, or queries, that are read at a time
_STAGES = 3
ROWS = 2 * HALF


def flash_backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    do_BTNH: Float[Array, "B T N H"],
    lse_BNT: Float[Array, "B N T"],
    slopes_BNT: Float[Array, "B N T"],
    seen: Seen,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of queries, keys and values.

    Args:
      q_BTNH: queries; bfloat16 or float16, H a multiple of 64 up to 128.
      k_BSKH: keys.
      v_BSKH: values.
      do_BTNH: cotangents of the result.
      lse_BNT: the log-sum-exp of scores, float32.
      slopes_BNT: float32, for each query its result times its cotangent, less the cotangent of its log-sum-exp.
      seen: what sees what.
      softcap: of the scores.
    """
    statistics = [jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % ROWS))) for x in (lse_BNT * LOG2E, slopes_BNT)]
    statistics_BN2T = jnp.stack(statistics, axis=2)
    arrays = q_BTNH, k_BSKH, v_BSKH, do_BTNH, statistics_BN2T
    dq_BTNH = _of_queries(*arrays, seen, softcap)
    dk_BSKH, dv_BSKH = _of_keys(*arrays, seen, softcap)
    return dq_BTNH, dk_BSKH, dv_BSKH


def _of_queries(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    do_BTNH: Array,
    statistics_BN2T: Array,
    seen: Seen,
    softcap: float | None,
) -> Array:
    (B, T, N, H), K, dtype = q_BTNH.shape, k_BSKH.shape[2], q_BTNH.dtype
    Q, scale = -(-T // ROWS), H**-0.5
    vectors = [padded(seen.first_BT, ROWS)]
    if seen.kinds_BS is not None:
        vectors += [padded(seen.document_BT, ROWS), padded(seen.kinds_BS, TILE)]

    def body(q: Any, k: Any, v: Any, do: Any, statistics: Any, table: Any, *rest: Any, **refs: Any) -> None:
        *of_keys, out = rest
        batch, head, number = lax.axis_index("batch"), lax.axis_index("head"), Q - 1 - lax.axis_index("tile")
        pinned, pinned_end, first, end, *most = [table[n, batch, number] for n in range(6)]
        pins = pinned_end - pinned
        steps = pins + end - first

        def key_of(step: Array) -> Array:
            return jnp.where(step < pins, pinned + step, first + step - pins) * TILE

        @pl.when(lax.axis_index("wg") == LOADER)
        def _() -> None:
            def copy(step: Array, slot: Array) -> None:
                place = batch, pl.ds(key_of(step), TILE), lax.div(head, jnp.int32(N // K))
                plgpu.copy_gmem_to_smem(k.at[place], refs["k_smem"].at[slot], refs["loaded"].at[slot])
                plgpu.copy_gmem_to_smem(v.at[place], refs["v_smem"].at[slot], refs["loaded"].at[slot])

            _load(steps, refs["consumed"], copy)

        @pl.when(lax.axis_index("wg") != LOADER)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            mine = lax.axis_index("wg")
            row = number * ROWS + mine * HALF
            rows, query = pl.ds(row, HALF), row + seen.offset
            mine_q, mine_do = refs["q_smem"].at[mine], refs["do_smem"].at[mine]
            plgpu.copy_gmem_to_smem(q.at[batch, rows, head], mine_q, refs["own_loaded"].at[mine])
            plgpu.copy_gmem_to_smem(do.at[batch, rows, head], mine_do, refs["own_loaded"].at[mine])
            visible = Visible(seen, of_keys, batch, rows, query, (HALF, TILE))
            lse_H, slope_H = (compat.load_by_row(statistics.at[batch, head, n], rows) for n in range(2))
            plgpu.barrier_wait(refs["own_loaded"].at[mine])

            def step(number: Array, dq: Array, is_masked: bool) -> Array:
                slot = lax.rem(number, jnp.int32(_STAGES))
                plgpu.barrier_wait(refs["loaded"].at[slot])
                keys, values = refs["k_smem"].at[slot], refs["v_smem"].at[slot]
                scores, dweights = compat.products(
                    (mine_q, compat.transposed(keys)), (mine_do, compat.transposed(values))
                )
                weights, bend = _weights(scores, lax.broadcast_in_dim(lse_H, scores.shape, (0,)), scale, softcap)
                if is_masked:
                    weights = jnp.where(visible.mask(key_of(number)), weights, 0.0)
                dscores = weights * (dweights - lax.broadcast_in_dim(slope_H, scores.shape, (0,)))
                dscores = dscores if bend is None else dscores * bend
                (dq,) = compat.add_products([dq], [(dscores.astype(dtype), keys)], _staging(refs, mine))
                plgpu.barrier_arrive(refs["consumed"].at[slot])
                return dq

            bounds = whole_steps(seen, jnp.where(mine == 0, *most), query, first, pins, steps, TILE)
            dq = in_three(step, compat.zeros((HALF, H)), bounds)
            mine_q[...] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine_q, out.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

    scratch = _scratch(("q_smem", "do_smem"), ("k_smem", "v_smem"), H, dtype, copies=2)
    run = compat.kernel(
        body,
        jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
        scratch,
        name="attention_dq",
        grid={"head": N, "tile": Q, "batch": B},
        approximate=True,
    )
    return run(q_BTNH, k_BSKH, v_BSKH, do_BTNH, statistics_BN2T, key_ranges(seen, TILE), *vectors)


def _of_keys(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    do_BTNH: Array,
    statistics_BN2T: Array,
    seen: Seen,
    softcap: float | None,
) -> tuple[Array, Array]:
    (B, _, N, H), (S, K), dtype = q_BTNH.shape, k_BSKH.shape[1:3], q_BTNH.dtype
    tiles, scale = -(-S // ROWS), H**-0.5
    vectors = [seen.first_BT] if seen.kinds_BS is None else [seen.first_BT, seen.document_BT]
    firsts_BVT = jnp.stack([padded(each, ROWS) for each in vectors], axis=1)
    of_keys = [] if seen.kinds_BS is None else [padded(seen.kinds_BS, ROWS)]

    def body(
        q: Any, k: Any, v: Any, do: Any, statistics: Any, table: Any, firsts: Any, *rest: Any, **refs: Any
    ) -> None:
        *kinds, dk_out, dv_out = rest
        batch, head, number = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        first, end, *whole = [table[n, batch, number] for n in range(4)]
        each = end - first  # steps for a query head

        @pl.when(lax.axis_index("wg") == LOADER)
        def _() -> None:
            def copy(step: Array, slot: Array) -> None:
                of_queries = pl.ds((first + lax.rem(step, each)) * TILE, TILE)
                query_head = head * (N // K) + lax.div(step, each)
                loaded = refs["loaded"].at[slot]
                plgpu.copy_gmem_to_smem(q.at[batch, of_queries, query_head], refs["q_smem"].at[slot], loaded)
                plgpu.copy_gmem_to_smem(do.at[batch, of_queries, query_head], refs["do_smem"].at[slot], loaded)
                of_head = statistics.at[batch, query_head, :, of_queries]
                plgpu.copy_gmem_to_smem(of_head, refs["statistics_smem"].at[slot], loaded)
                plgpu.copy_gmem_to_smem(firsts.at[batch, :, of_queries], refs["firsts_smem"].at[slot], loaded)

            _load(each * (N // K), refs["consumed"], copy)

        @pl.when(lax.axis_index("wg") != LOADER)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            mine = lax.axis_index("wg")
            key = number * ROWS + mine * HALF
            rows = pl.ds(key, HALF)
            mine_k, mine_v = refs["k_smem"].at[mine], refs["v_smem"].at[mine]
            plgpu.copy_gmem_to_smem(k.at[batch, rows, head], mine_k, refs["own_loaded"].at[mine])
            plgpu.copy_gmem_to_smem(v.at[batch, rows, head], mine_v, refs["own_loaded"].at[mine])
            kinds_H = compat.load_by_row(kinds[0].at[batch], rows) if kinds else None
            plgpu.barrier_wait(refs["own_loaded"].at[mine])

            def mask(tile: Array, slot: Array) -> Array:
                shape = HALF, TILE
                keys = compat.row_numbers(shape) + key
                queries = up_to(seen.most, compat.column_numbers(shape) + (tile * TILE + seen.offset))
                firsts = [
                    lax.broadcast_in_dim(
                        compat.load_by_column(refs["firsts_smem"].at[slot, n], pl.ds(0, TILE)), shape, (1,)
                    )
                    for n in range(len(vectors))
                ]
                of_rows = None if kinds_H is None else lax.broadcast_in_dim(kinds_H, shape, (0,))
                return are_seen(keys, queries, firsts, of_rows)

            def of_head(number: Array, carried: Any) -> Any:
                def step(tile: Array, carried: Any, is_masked: bool) -> Any:
                    slot = lax.rem(number * each + tile - first, jnp.int32(_STAGES))
                    plgpu.barrier_wait(refs["loaded"].at[slot])
                    queries, slopes = refs["q_smem"].at[slot], refs["do_smem"].at[slot]
                    scores, dweights = compat.products(
                        (mine_k, compat.transposed(queries)), (mine_v, compat.transposed(slopes))
                    )
                    lse, slope = (
                        lax.broadcast_in_dim(
                            compat.load_by_column(refs["statistics_smem"].at[slot, n], pl.ds(0, TILE)),
                            scores.shape,
                            (1,),
                        )
                        for n in range(2)
                    )
                    weights, bend = _weights(scores, lse, scale, softcap)
                    if is_masked:
                        weights = jnp.where(mask(tile, slot), weights, 0.0)
                    dscores = weights * (dweights - slope)
                    dscores = dscores if bend is None else dscores * bend
                    factors = [(dscores.astype(dtype), queries), (weights.astype(dtype), slopes)]
                    sums = compat.add_products(list(carried), factors, _staging(refs, mine))
                    plgpu.barrier_arrive(refs["consumed"].at[slot])
                    return tuple(sums)

                # The first tile of queries that all stand behind all of these keys.
                behind = lax.div(jnp.maximum(key + (HALF - 1) - seen.offset, 0) + (TILE - 1), jnp.int32(TILE))
                begin = jnp.clip(behind, first, end)
                bounds = first, begin, jnp.clip(jnp.where(mine == 0, *whole), begin, end), end
                return in_three(step, carried, bounds)

            zeros = compat.zeros((HALF, H)), compat.zeros((HALF, H))
            dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(N // K), of_head, zeros)
            mine_k[...] = (dk * scale).astype(dtype)
            mine_v[...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine_k, dk_out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(mine_v, dv_out.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

    scratch = _scratch(("k_smem", "v_smem"), ("q_smem", "do_smem"), H, dtype, copies=4)
    scratch["statistics_smem"] = plgpu.SMEM((_STAGES, 2, TILE), jnp.float32)
    scratch["firsts_smem"] = plgpu.SMEM((_STAGES, len(vectors), TILE), jnp.int32)
    run = compat.kernel(
        body,
        [jax.ShapeDtypeStruct(k_BSKH.shape, dtype)] * 2,
        scratch,
        name="attention_dkv",
        grid={"head": K, "tile": tiles, "batch": B},
        approximate=True,
    )
    dk_BSKH, dv_BSKH = run(
        q_BTNH, k_BSKH, v_BSKH, do_BTNH, statistics_BN2T, query_ranges(seen, TILE), firsts_BVT, *of_keys
    )
    return dk_BSKH, dv_BSKH


def _scratch(own: tuple[str, str], others: tuple[str, str], H: int, dtype: Any, copies: int) -> dict[str, Any]:
    """Shared memory for two blocks of each warpgroup's own, and for two of what is read, in stages."""
    scratch: dict[str, Any] = {name: compat.swizzled((2, HALF, H), dtype) for name in own}
    scratch |= {name: compat.swizzled((_STAGES, TILE, H), dtype) for name in others}
    scratch |= dict(
        own_loaded=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        loaded=plgpu.Barrier(num_arrivals=copies, num_barriers=_STAGES),
        consumed=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
    )
    if compat.is_interpreted():
        scratch["staging"] = compat.swizzled((2, HALF, TILE), dtype)
    return scratch


def _staging(refs: dict[str, Any], mine: Array) -> Any:
    return refs["staging"].at[mine] if "staging" in refs else None


def _load(steps: Array, consumed: Any, copy: Callable[[Array, Array], None]) -> None:
    plgpu.set_max_registers(40, action="decrease")
    fill(jnp.int32(0), steps, consumed, copy)
    drain(steps, consumed)


def _weights(scores: Array, lse: Array, scale: float, softcap: float | None) -> tuple[Array, Array | None]:
    """Weights from products of queries and keys, and the slope of the soft cap."""
    if softcap is None:
        return jnp.exp2(scores * (scale * LOG2E) - lse), None
    scores, bend = capped(scores, scale, softcap)
    return jnp.exp2(scores * LOG2E - lse), bend

"""Attention of few queries over keys and values where a cache holds them, on Hopper GPUs.

Each block reads some of a row's keys, of one key/value head, once for all queries of that head; a second kernel joins
what the blocks found. Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html. B batch, T queries,
S slots, N query heads, K key/value heads, G = N/K, H head size, R = T G, J blocks of a row and head.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.flash import HIDDEN, LOG2E, capped
from stellarbyte_jax.ops.stored import Stored, numbers

ROWS = 64  # of queries, which the tensor cores take at once
MOST_QUERIES = ROWS - 8  # R: the first may be any of 8 rows
TILE = 64  # keys
PINNED = 1 << 30  # is added to the position of a key that no window hides
_SHARED = 4  # blocks that a multiprocessor has room for
_MOST_SPLITS = 64


def splits_of(rows: int, tiles: int) -> int:
    """J, where ``rows`` rows and heads have ``tiles`` tiles of slots each: enough to fill the device."""
    return max(1, min(-(-_SHARED * compat.processors() // rows), -(-tiles // 2), _MOST_SPLITS))


def decode_attention(
    q_BTNH: Float[Array, "B T N H"],
    stored: Stored,
    places_BS: Int[Array, "B S"],
    positions_BT: Int[Array, "B T"],
    first_B: Int[Array, " B"] | None,
    end_B: Int[Array, " B"],
    window: int | None,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention and the log-sum-exp of scores, float32.

    Args:
      q_BTNH: queries; bfloat16 or float16, H 64 or 128.
      stored: keys and values; S even, and at least a tile.
      places_BS: position of each key, negative for a slot without one; :data:`PINNED` more where no window hides it.
      positions_BT: of the queries.
      first_B: before this slot no query of the row sees a key; None: 0.
      end_B: nor from this slot on.
      window: number of positions that a query sees, itself included; None for all.
      softcap: replaces scores s by ``softcap * tanh(s / softcap)``.
    """
    (B, T, N, H), (S, K), dtype = q_BTNH.shape, stored.keys.shape[2:4], q_BTNH.dtype
    G, R = N // K, T * (N // K)
    J, scale = splits_of(B * K, -(-S // TILE)), H**-0.5
    # Queries of a key/value head are neighbours; of one token they are so already. Copies take 64 rows from a multiple
    # of 8 on.
    q_RH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 2).reshape(B * K * R, H)
    q_RH = jnp.pad(q_RH, ((0, -q_RH.shape[0] % 8), (0, 0)))
    copied = min(ROWS, q_RH.shape[0])
    by_row = [] if T == 1 else [_of_rows(positions_BT, K, G)]
    by_batch = [] if first_B is None else [first_B]
    scales = [] if stored.key_scales is None else [stored.key_scales, stored.value_scales]
    scratch: dict[str, Any] = dict(
        q_smem=compat.swizzled((ROWS, H), dtype),
        kv_smem=compat.swizzled((2, TILE, H), dtype),
        out_smem=plgpu.SMEM((ROWS, H), jnp.float32),
        q_loaded=plgpu.Barrier(),
    )
    if compat.is_interpreted():
        scratch["staging"] = compat.swizzled((ROWS, TILE), dtype)

    def body(
        q: Any, k: Any, v: Any, layers: Any, places: Any, positions: Any, ends: Any, *rest: Any,
        q_smem: Any, kv_smem: Any, out_smem: Any, q_loaded: Any, staging: Any = None,
    ) -> None:  # fmt: skip
        *others, parts = rest
        firsts, others = others[: len(by_batch)], others[len(by_batch) :]
        row_positions, factors = others[: len(by_row)], others[len(by_row) :]
        batch, head, split = (lax.axis_index(name) for name in ("batch", "head", "split"))
        layer, begin, end = layers[0], firsts[0][batch] if firsts else jnp.int32(0), ends[batch]
        row = (batch * K + head) * R
        above = lax.rem(row, jnp.int32(8))  # rows of other heads before it in what is copied
        plgpu.copy_gmem_to_smem(q.at[pl.ds(row - above, copied)], q_smem.at[pl.ds(0, copied)], q_loaded)
        first = lax.div(begin, jnp.int32(TILE))
        tiles = jnp.maximum(lax.div(end + (TILE - 1), jnp.int32(TILE)) - first, 0)
        shape = ROWS, TILE
        if T == 1:
            position = positions[batch, 0]
        else:
            vector = compat.load_by_row(row_positions[0], pl.ds(row - above, ROWS))
            position = lax.broadcast_in_dim(vector, shape, (0,))
        plgpu.barrier_wait(q_loaded)

        def by_column(x: Array) -> Array:
            return lax.broadcast_in_dim(x, shape, (1,))

        def hidden(place: Array, key: Array, slot: Array) -> Array:
            """What is added to scores."""
            each = place if T == 1 else by_column(place)
            bare = jnp.where(each >= PINNED, each - PINNED, each)
            seen = (bare >= 0) & (bare <= position)
            if window is not None:
                seen = seen & ((each >= PINNED) | (bare > position - window))
            found = jnp.where(seen, 0.0, HIDDEN)
            found = by_column(found) if T == 1 else found
            if S % TILE:  # the last tile begins where it ends with the slots: some are those of the one before
                found = found + by_column(jnp.where(compat.column_vector(TILE) + key >= slot, 0.0, HIDDEN))
            return found

        def step(number: Array, carried: Any) -> Any:
            total, most_R, sum_R = carried
            slot = (first + number) * TILE
            key = jnp.minimum(slot, S - TILE)
            slots = pl.ds(key, TILE)
            # All is on its way before any of it is waited for.
            bits = [compat.load_wide(x.at[layer, batch, slots, head], (TILE, H), dtype) for x in (k, v)]
            place = compat.load_by_column(places.at[batch], slots)
            scales = [compat.load_by_column(x.at[layer, batch, head], slots) for x in factors]
            for which, x in enumerate(bits):
                kv_smem[which] = _widened(x, stored.dtype, dtype)
            plgpu.commit_smem()
            (scores,) = compat.products((q_smem, compat.transposed(kv_smem.at[0])))
            if scales:
                scores = scores * by_column(scales[0])
            factor = scale * LOG2E
            if softcap is not None:
                (scores, _), factor = capped(scores, scale, softcap), LOG2E
            scores = scores * factor + hidden(place, key, slot)
            new_R = jnp.maximum(most_R, jnp.max(scores, axis=1))
            # Before the first key that is seen hidden ones count; then what was summed is multiplied with 0.
            shrink_R = jnp.exp2(most_R - new_R)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new_R, shape, (0,)))
            total = total * lax.broadcast_in_dim(shrink_R, total.shape, (0,))
            sum_R = sum_R * shrink_R + jnp.sum(weights, axis=1)
            if scales:
                weights = weights * by_column(scales[1])
            (total,) = compat.add_products([total], [(weights.astype(dtype), kv_smem.at[1])], staging)
            return total, new_R, sum_R

        nothing = compat.zeros((ROWS, H)), compat.zeros_by_row(ROWS) + HIDDEN, compat.zeros_by_row(ROWS)
        total, most_R, sum_R = lax.fori_loop(
            lax.div(split * tiles, jnp.int32(J)), lax.div((split + 1) * tiles, jnp.int32(J)), step, nothing
        )
        sum_R = jnp.where(sum_R > 0, sum_R, 1.0)
        total = total * lax.broadcast_in_dim(1 / sum_R, total.shape, (0,))
        lse = lax.broadcast_in_dim(most_R / LOG2E + jnp.log(sum_R), total.shape, (0,))
        for which, value in enumerate((total, lse)):
            compat.store_plain(out_smem, value)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(above, R)], parts.at[which, pl.ds(row, R), split])
            plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct((2, B * K * R, -(-J // 8) * 8, H), jnp.float32)
    grid = {"head": K, "split": J, "batch": B}
    run = compat.kernel(body, shape, scratch, name="attention_decode", threads=1, grid=grid, approximate=True)
    layer = stored.layer.reshape(1)
    parts = run(q_RH, stored.keys, stored.values, layer, places_BS, positions_BT, end_B, *by_batch, *by_row, *scales)
    out_RH, lse_RH = _joined(parts, J, dtype)
    out = jnp.moveaxis(out_RH.reshape(B, K, T, G, H), 2, 1).reshape(B, T, N, H)
    return out, jnp.moveaxis(lse_RH[:, 0].reshape(B, K, T, G), 2, 1).reshape(B, T, N)


def _of_rows(positions_BT: Array, K: int, G: int) -> Array:
    """The position of each row of queries, and zeros for those behind the last one."""
    B, T = positions_BT.shape
    each = jnp.broadcast_to(positions_BT[:, None, :, None], (B, K, T, G)).reshape(-1)
    return jnp.pad(each, (0, ROWS))


def _widened(x: Array, dtype: str, to: Any) -> Array:
    """Numbers that are stored as ``dtype``, in that of the queries."""
    x = numbers(x, dtype)
    return x if x.dtype == to else (x if dtype == "int8" else x.astype(jnp.float32)).astype(to)


def _joined(parts: Array, J: int, dtype: Any) -> tuple[Array, Array]:
    """What queries found, [R, H], and the log-sum-exp in each column, from [2, R, J or more, H] of J blocks."""
    rows, held, H = parts.shape[1:]

    def body(parts: Any, out: Any, lse_out: Any) -> None:
        row = lax.axis_index("row")
        found, lse = (compat.load_rows(parts.at[which, row], (held, H)) for which in range(2))
        if J < held:  # nobody wrote the others
            inside = compat.numbers_of_rows((held, H)) < J
            found, lse = jnp.where(inside, found, 0.0), jnp.where(inside, lse, HIDDEN)
        most_H = jnp.max(lse, axis=0)
        weights = jnp.exp2((lse - compat.for_each_row(most_H, (held, H))) * LOG2E)
        sum_H = jnp.sum(weights, axis=0)
        compat.store_plain(out.at[row], (jnp.sum(found * weights, axis=0) / sum_H).astype(dtype))
        compat.store_plain(lse_out.at[row], most_H + jnp.log(sum_H))

    shapes = jax.ShapeDtypeStruct((rows, H), dtype), jax.ShapeDtypeStruct((rows, H), jnp.float32)
    run = compat.kernel(body, shapes, {}, name="attention_decode_join", threads=1, grid={"row": rows}, approximate=True)
    return run(parts)

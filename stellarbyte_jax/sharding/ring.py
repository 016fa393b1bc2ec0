"""Attention of rows that are split by position: keys and values go round the devices.

Liu et al. 2023, https://arxiv.org/abs/2310.01889. A row is cut into twice as many chunks as there are devices C, and
device c has the chunks c and 2 C - 1 - c, so that all compute the same number of scores under a causal mask (Brandon et
al. 2023, https://arxiv.org/abs/2311.09431).

B batch, T positions of a device, h = T/2, N query heads, K key/value heads, H head size.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.attention import Mask
from stellarbyte_jax.ops.attention.blocks import Partial, attend_block, block_gradients

AXIS = "context"


def dealt_order(length: int, devices: int) -> Int[np.ndarray, " length"]:
    """Indices in a row, in the order in which devices have them."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([np.concatenate([chunks[c], chunks[-1 - c]]) for c in range(devices)])


class Keys(NamedTuple):
    """What goes round.

    Attributes:
      k: keys [B, T, K, H].
      v: values [B, T, K, H].
      seen: what a mask says of them: indices, segments and which no window hides.
    """

    k: Array
    v: Array
    seen: tuple[Array, Array | None, Array | None]

    def half(self, first: bool) -> "Keys":
        """Those of one chunk."""
        return jax.tree.map(lambda x: _half(x, first), self)


class Queries(NamedTuple):
    """What stays.

    Attributes:
      q: queries [B, T, N, H].
      seen: what a mask says of them: indices and segments.
    """

    q: Array
    seen: tuple[Array, Array | None]

    def half(self, first: bool) -> "Queries":
        """Those of one chunk."""
        return jax.tree.map(lambda x: _half(x, first), self)


def ring_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Mask,
    *,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Inside of ``shard_map``: attention over the whole row of tokens in :func:`dealt_order`.

    Args:
      q_BTNH: queries of this device.
      k_BTKH: its keys.
      v_BTKH: its values.
      mask: of its tokens, with their indices in the row.
      softcap: of the scores.
    """
    queries = Queries(q_BTNH, (mask.q_positions_BT, mask.q_segments_BT))
    keys = Keys(k_BTKH, v_BTKH, (mask.k_positions_BSK, mask.k_segments_BS, mask.always_visible_BSK))
    return _ring(queries, keys, mask.window, softcap)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _ring(queries: Queries, keys: Keys, window: int | None, softcap: float | None) -> Array:
    return _forward(queries, keys, window, softcap)[0]


def _forward(
    queries: Queries, keys: Keys, window: int | None, softcap: float | None
) -> tuple[Array, tuple[Queries, Keys, Partial]]:
    def attend(q: Queries, k: Keys) -> Partial:
        return attend_block(q.q, k.k, k.v, _mask(q, k, window), softcap)

    low, high = (queries.half(first) for first in (True, False))
    of_low = attend(low, keys.half(True))
    of_high = attend(high, keys.half(True)).merged(attend(high, keys.half(False)))

    def turn(carry: tuple[Keys, Partial, Partial], step: Array):
        keys, of_low, of_high = carry
        keys = _passed_on(keys)
        of_high = of_high.merged(attend(high, keys.half(True)))
        earlier = _from_earlier(step)
        more = attend(_select(earlier, low, high), _select(earlier, keys.half(True), keys.half(False)))
        of_low = _select(earlier, of_low.merged(more), of_low)
        of_high = _select(earlier, of_high, of_high.merged(more))
        return (keys, of_low, of_high), None

    (_, of_low, of_high), _ = jax.lax.scan(turn, (keys, of_low, of_high), _steps())
    merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), of_low, of_high)
    return merged.out_BTNH.astype(keys.v.dtype), (queries, keys, merged)


def _backward(
    window: int | None, softcap: float | None, kept: tuple[Queries, Keys, Partial], slope_BTNH: Array
) -> tuple[Queries, Keys]:
    queries, keys, merged = kept
    halves = [
        (queries.half(first), jax.tree.map(partial(_half, first=first), merged), _half(slope_BTNH, first))
        for first in (True, False)
    ]

    def slopes(of: tuple[Queries, Partial, Array], k: Keys) -> tuple[Array, tuple[Array, Array]]:
        q, merged, slope = of
        dq, dk, dv = block_gradients(q.q, k.k, k.v, _mask(q, k, window), softcap, merged, slope)
        return dq, (dk, dv)

    low, high = halves
    dlow, first = slopes(low, keys.half(True))
    dhigh, more = slopes(high, keys.half(True))
    dhigh_last, last = slopes(high, keys.half(False))
    dkeys = jax.tree.map(lambda a, b, c: jnp.concatenate([a + b, c], axis=1), first, more, last)

    def turn(carry: Any, step: Array):
        keys, dkeys, dlow, dhigh = carry
        keys, dkeys = _passed_on(keys), _passed_on(dkeys)
        dq, first = slopes(high, keys.half(True))
        dhigh += dq
        earlier = _from_earlier(step)
        dq, more = slopes(_select(earlier, low, high), _select(earlier, keys.half(True), keys.half(False)))
        dlow, dhigh = jnp.where(earlier, dlow + dq, dlow), jnp.where(earlier, dhigh, dhigh + dq)
        zero = jax.tree.map(jnp.zeros_like, more)
        first = jax.tree.map(jnp.add, first, _select(earlier, more, zero))
        last = _select(earlier, zero, more)
        dkeys = jax.tree.map(lambda d, a, b: d + jnp.concatenate([a, b], axis=1), dkeys, first, last)
        return (keys, dkeys, dlow, dhigh), None

    carry = (keys, dkeys, dlow, dhigh + dhigh_last)
    (_, dkeys, dlow, dhigh), _ = jax.lax.scan(turn, carry, _steps())
    dk, dv = _passed_on(dkeys)  # home
    dq = jnp.concatenate([dlow, dhigh], axis=1).astype(queries.q.dtype)
    return (
        Queries(dq, jax.tree.map(_no_slope, queries.seen)),
        Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), jax.tree.map(_no_slope, keys.seen)),
    )


_ring.defvjp(_forward, _backward)


def _steps() -> Array:
    return jnp.arange(1, jax.lax.axis_size(AXIS), dtype=jnp.int32)


def _from_earlier(step: Array) -> Array:
    """Whether the keys that are here after so many steps come from a device with an earlier first chunk."""
    return jax.lax.axis_index(AXIS) >= step


def _passed_on(tree: Any) -> Any:
    devices = jax.lax.axis_size(AXIS)
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def _mask(queries: Queries, keys: Keys, window: int | None) -> Mask:
    (q_positions, q_segments), (k_positions, k_segments, always_visible) = queries.seen, keys.seen
    return Mask(q_positions, k_positions, q_segments, k_segments, None, always_visible, window)


def _half(x: Array, first: bool) -> Array:
    h = x.shape[1] // 2
    return x[:, :h] if first else x[:, h:]


def _select(condition: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def _no_slope(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)

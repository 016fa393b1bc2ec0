"""Attention of rows that are split by position: keys and values go round the devices.

Liu et al. 2023, https://arxiv.org/abs/2310.01889. A row is cut into twice as many chunks as there are devices C, and
device c has the chunks c and 2 C - 1 - c, so that all compute the same number of scores under a causal mask (Brandon et
al. 2023, https://arxiv.org/abs/2311.09431).

Of the chunks a, b of device c and the keys d, e of another, two pairs have scores, both of keys that are all earlier:
b with d, and either a with d (where d is before a) or b with e. The second pair is chosen by a selection of arrays, not
by a branch of the program, for which a GPU would wait for the host. So every device makes the same calls.

B batch, T positions of a device, h = T/2, N query heads, K key/value heads, H head size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.attention import Mask
from stellarbyte_jax.ops.attention.blocks import Blocks, Keys, Partial, Queries, halves, joined
from stellarbyte_jax.ops.attention.blocks_cudnn import CudnnBlocks, refuse_blocks
from stellarbyte_jax.ops.attention.blocks_pallas import PallasBlocks, refuse_pallas_blocks
from stellarbyte_jax.ops.attention.blocks_xla import XlaBlocks

AXIS = "context"


def dealt_order(length: int, devices: int) -> Int[np.ndarray, " length"]:
    """Indices in a row, in the order in which devices have them."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([np.concatenate([chunks[c], chunks[-1 - c]]) for c in range(devices)])


def cudnn_ring(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Mask,
    *,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """As :func:`xla_ring`, with the fused kernels of cuDNN.

    Raises:
      NotImplementedError: the kernels do not support the arguments or the device.
    """
    hides = mask.window is not None and mask.window < q_BTNH.shape[1] * jax.lax.axis_size(AXIS)
    refuse_blocks(q_BTNH, window=hides, softcap=softcap is not None)
    return ring_attention(q_BTNH, k_BTKH, v_BTKH, mask, CudnnBlocks())


def pallas_ring(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Mask,
    *,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """As :func:`xla_ring`, with the kernels for Hopper GPUs.

    Raises:
      NotImplementedError: the kernels do not support the arguments or the device.
    """
    refuse_pallas_blocks(q_BTNH, mask.always_visible_BSK)
    return ring_attention(q_BTNH, k_BTKH, v_BTKH, mask, PallasBlocks(mask.window, softcap))


def xla_ring(
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
    return ring_attention(q_BTNH, k_BTKH, v_BTKH, mask, XlaBlocks(mask.window, softcap))


# In the order in which "auto" tries them; XLA refuses nothing.
RINGS = {"cudnn": cudnn_ring, "xla": xla_ring, "pallas": pallas_ring}


def ring_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Mask,
    blocks: Blocks,
) -> Float[Array, "B T N H"]:
    """:func:`xla_ring` with any kernel for blocks."""
    queries = Queries(q_BTNH, mask.q_positions_BT, mask.q_segments_BT)
    keys = Keys(k_BTKH, v_BTKH, mask.k_positions_BSK, mask.k_segments_BS, mask.always_visible_BSK)
    B = q_BTNH.shape[0]
    queries, keys = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])), (queries, keys))
    return _ring(queries, keys, blocks)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring(queries: Queries, keys: Keys, blocks: Blocks) -> Array:
    return _forward(queries, keys, blocks)[0]


def _forward(queries: Queries, keys: Keys, blocks: Blocks) -> tuple[Array, tuple[Queries, Keys, Partial]]:
    low, high = halves(queries)

    def absorb(step: Array | int, keys: Keys, of_low: Partial, of_high: Partial) -> tuple[Partial, Partial]:
        first, last = halves(keys)
        earlier = _from_earlier(step)
        of_high = of_high.merged(blocks.attend(high, first))
        more = blocks.attend(_select(earlier, low, high), _select(earlier, first, last))
        more = _select(earlier, of_low, of_high).merged(more)
        return _select(earlier, more, of_low), _select(earlier, of_high, more)

    def turn(carry: tuple[Keys, Partial, Partial], step: Array) -> tuple[Any, None]:
        coming = _passed_on(carry[0])  # it does not wait for the products of this step
        return (coming, *absorb(step, *carry)), None

    devices = jax.lax.axis_size(AXIS)
    coming = _passed_on(keys) if devices > 1 else keys
    found = halves(blocks.attend_own(queries, keys))
    if devices > 1:
        carry, _ = jax.lax.scan(turn, (coming, *found), _steps())
        found = absorb(devices - 1, *carry)
    merged = joined(*found)
    merged = merged._replace(out_BTNH=merged.out_BTNH.astype(keys.v_BSKH.dtype))
    return merged.out_BTNH, (queries, keys, merged)


def _backward(blocks: Blocks, kept: tuple[Queries, Keys, Partial], slope_BTNH: Array) -> tuple[Queries, Keys]:
    queries, keys, merged = kept
    low, high = halves((queries, merged, slope_BTNH))

    def add(step: Array | int, keys: Keys, dkv: Any, dlow: Array, dhigh: Array) -> tuple[Any, Array, Array]:
        first, last = halves(keys)
        earlier = _from_earlier(step)
        dq, dfirst = _gradients(blocks, high, first)
        dq_more, dkv_more = _gradients(blocks, _select(earlier, low, high), _select(earlier, first, last))
        zero = jax.tree.map(jnp.zeros_like, dkv_more)
        dfirst = jax.tree.map(jnp.add, dfirst, _select(earlier, dkv_more, zero))
        dkv = jax.tree.map(jnp.add, dkv, joined(dfirst, _select(earlier, zero, dkv_more)))
        dlow, dhigh = dlow + jnp.where(earlier, dq_more, 0.0), dhigh + dq + jnp.where(earlier, 0.0, dq_more)
        return dkv, dlow, dhigh

    def turn(carry: Any, step: Array) -> tuple[Any, None]:
        keys, dkv, dlow, dhigh = carry
        coming, dkv = _passed_on((keys, dkv))  # neither waits for the products of this step
        return (coming, *add(step, keys, dkv, dlow, dhigh)), None

    devices = jax.lax.axis_size(AXIS)
    coming = _passed_on(keys) if devices > 1 else keys
    dq, dkv = blocks.gradients_own(queries, keys, merged, slope_BTNH)
    if devices > 1:
        (last, dkv, *dhalves), _ = jax.lax.scan(turn, (coming, dkv, *halves(dq)), _steps())
        dkv, *dhalves = add(devices - 1, last, _passed_on(dkv), *dhalves)
        dkv, dq = _passed_on(dkv), joined(*dhalves)  # home
    dk, dv = dkv
    return (
        jax.tree.map(_no_slope, queries)._replace(q_BTNH=dq.astype(queries.q_BTNH.dtype)),
        jax.tree.map(_no_slope, keys)._replace(
            k_BSKH=dk.astype(keys.k_BSKH.dtype), v_BSKH=dv.astype(keys.v_BSKH.dtype)
        ),
    )


_ring.defvjp(_forward, _backward)


def _gradients(blocks: Blocks, of: tuple[Queries, Partial, Array], keys: Keys) -> Any:
    queries, merged, slope_BTNH = of
    return blocks.gradients(queries, keys, merged, slope_BTNH)


def _steps() -> Array:
    """All but the last, after which keys stay where they are."""
    return jnp.arange(1, jax.lax.axis_size(AXIS) - 1, dtype=jnp.int32)


def _from_earlier(step: Array | int) -> Array:
    """Whether the keys that are here after so many steps come from a device with an earlier first chunk."""
    return jax.lax.axis_index(AXIS) >= step


def _passed_on(tree: Any) -> Any:
    devices = jax.lax.axis_size(AXIS)
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def _select(condition: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def _no_slope(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)

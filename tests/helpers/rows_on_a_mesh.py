"""Queries, keys, values and masks of rows that tests split over devices."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stellarbyte_jax.ops.attention import Mask, always_visible

B, T, H = 4, 32, 8
AXES = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


def arrays(N: int = 8, K: int = 4, seed: int = 0) -> list[Array]:
    """Queries, keys, values and a gradient of the output."""
    random = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    return [jax.device_put(np.asarray(random.standard_normal(shape), np.float32)) for shape in shapes]


def packed() -> Array:
    """Documents of every length, and padding at the end of one row."""
    segments = np.zeros((B, T), np.int32)
    for row, cuts in enumerate(((1, 2, 20), (16,), (8, 9, 30), ())):
        ends = [*cuts, T if row else T - 3]
        for number, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            segments[row, start:end] = number + 1
    return jax.device_put(segments)


def mask_of(kind: str, order: np.ndarray | None = None) -> Mask:
    """A mask of what ``kind`` names, of tokens in another order if one is given."""
    rows_1T = jnp.arange(T, dtype=jnp.int32)[None]
    segments_BT = packed() if "packed" in kind else None
    visible_BSK = None
    if "sinks" in kind:
        positions_BT = jnp.broadcast_to(rows_1T, (B, T))
        visible_BSK = always_visible(positions_BT[..., None], sink_tokens=2)
    window = 7 if "window" in kind else None
    aligned = order is None
    if order is not None:
        rows_1T = rows_1T[:, order]
        segments_BT = None if segments_BT is None else segments_BT[:, order]
        visible_BSK = None if visible_BSK is None else visible_BSK[:, order]
    return Mask(rows_1T, rows_1T[..., None], segments_BT, segments_BT, None, visible_BSK, window, None, aligned)


def output_and_gradients(attend: Callable[..., Array], given: Sequence[Array], slope: Array) -> tuple[Array, ...]:
    """The output, and gradients of queries, keys and values."""

    def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        out = attend(q, k, v)
        return jnp.sum(out * slope), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)
    return out, *gradients

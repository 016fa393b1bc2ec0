"""Attention by ``jax.nn.dot_product_attention`` on XLA.

B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.attention.mask import Mask
from stellarbyte_jax.ops.attention.options import AttentionOutput, Options


def refuse_unfusable(options: Options) -> None:
    """Raises NotImplementedError where no fused attention can do what is asked for."""
    if options.softcap is not None:
        raise NotImplementedError("a logit soft cap")
    if options.prune_below > 0.0:
        raise NotImplementedError("pruning of low weights")
    if options.dropout is not None and options.dropout.rate > 0.0:
        raise NotImplementedError("attention dropout")
    if options.return_weights:
        raise NotImplementedError("attention weights as a result")


def xla_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    options: Options,
) -> AttentionOutput:
    """As :func:`attention`.

    Raises:
      NotImplementedError: a soft cap, pruning, dropout or weights are asked for, keys differ in place by head, the
        log-sum-exp of narrow inputs, which jax rounds to their dtype, or float16 on a CPU.
    """
    refuse_unfusable(options)
    if options.return_lse and q_BTNH.dtype != jnp.float32:
        raise NotImplementedError(f"the log-sum-exp of {q_BTNH.dtype} inputs")
    if q_BTNH.dtype == jnp.float16 and jax.default_backend() == "cpu":
        raise NotImplementedError("float16 on a CPU, which jax cannot sum in float32 there")
    if mask.k_positions_BSK.shape[2] != 1:
        raise NotImplementedError("keys whose indices differ from head to head")
    allowed: Array | None = None
    window = mask.window
    plain = mask.always_visible_BSK is None and mask.k_valid_BS is None
    indexed = mask.aligned and q_BTNH.shape[1] == k_BSKH.shape[1] and plain
    if not indexed:
        allowed, window = mask.allowed(), None
    elif mask.q_segments_BT is not None and mask.k_segments_BS is not None:
        allowed = (mask.q_segments_BT[:, :, None] == mask.k_segments_BS[:, None, :])[:, None]
    with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 and float32 inside
        found: Any = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=allowed,
            is_causal=indexed,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="xla",
            return_residual=options.return_lse,
        )
    out_BTNH, lse_BTN = found if options.return_lse else (found, None)
    return AttentionOutput(out_BTNH, None, lse_BTN)

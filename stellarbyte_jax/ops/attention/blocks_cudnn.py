"""Blocks of attention by the fused cuDNN kernels, packed documents included.

B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.attention.blocks import NOTHING, Blocks, Gradients, Keys, Partial, Queries
from stellarbyte_jax.ops.attention.blocks_xla import XlaBlocks
from stellarbyte_jax.ops.attention.cudnn import refuse_queries

_OPERANDS = (
    "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v activation fwd_output "
    "grad_output"
).split()
_SETTINGS = {"scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"}


def refuse_blocks(q_BTNH: Float[Array, "B T N H"], *, window: bool, softcap: bool) -> None:
    """Raises NotImplementedError, with the reason, where :class:`CudnnBlocks` cannot compute what is asked for."""
    refuse_queries(q_BTNH)
    T = q_BTNH.shape[1]
    if T % 4:
        raise NotImplementedError(f"{T} positions a device: a multiple of 4 is needed")
    if softcap:
        raise NotImplementedError("a logit soft cap")
    if window:
        raise NotImplementedError("a window, whose edge would cross blocks of other devices' keys")
    _backward_settings()


@dataclass(frozen=True)
class CudnnBlocks(Blocks):
    """Of one document a row, or of packed ones.

    Of a document, the queries of a later block are its first ones and the keys of an earlier block its last ones, and
    one document alone can reach from block to block. So its scores are a rectangle, which the kernel finds by the
    lengths of its sides once keys are in reverse; no mask [T, S] is in memory. On the diagonal, packed documents leave
    squares of ``whole`` positions, which XLA computes.
    """

    whole: ClassVar[int] = 512

    def attend(self, queries: Queries, keys: Keys) -> Partial:
        """As :class:`Blocks`."""
        if keys.segments_BS is None:
            return _partial(*_forward(queries.q_BTNH, keys.k_BSKH, keys.v_BSKH, False, None))
        reaching = _reaching(queries, keys)
        k_BSKH, v_BSKH = (jnp.flip(x, 1) for x in (keys.k_BSKH, keys.v_BSKH))
        found = _partial(*_forward(queries.q_BTNH, k_BSKH, v_BSKH, False, _lengths(reaching)))
        seen_BT = _first(queries.q_BTNH, reaching[0])
        out_BTNH = jnp.where(seen_BT[..., None, None], found.out_BTNH, 0.0)
        return Partial(out_BTNH, jnp.where(seen_BT[..., None], found.lse_BTN, NOTHING))

    def gradients(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """As :class:`Blocks`."""
        q_BTNH, k_BSKH, v_BSKH = queries.q_BTNH, keys.k_BSKH, keys.v_BSKH
        if keys.segments_BS is None:
            return _wide(*_backward(q_BTNH, k_BSKH, v_BSKH, merged, slope_BTNH, False, None))
        reaching = _reaching(queries, keys)
        seen_BT11, seeing_BS11 = (
            _first(x, n)[..., None, None] for x, n in zip((q_BTNH, k_BSKH), reaching, strict=True)
        )
        # Weights of queries outside of the rectangle are exp(score - lse): zero, whatever the kernel does with them.
        lse_BTN = jnp.where(seen_BT11[..., 0], merged.lse_BTN, -NOTHING)
        merged = Partial(jnp.where(seen_BT11, merged.out_BTNH, jnp.zeros((), merged.out_BTNH.dtype)), lse_BTN)
        slope_BTNH = jnp.where(seen_BT11, slope_BTNH, jnp.zeros((), slope_BTNH.dtype))
        k_BSKH, v_BSKH = jnp.flip(k_BSKH, 1), jnp.flip(v_BSKH, 1)
        found = _backward(q_BTNH, k_BSKH, v_BSKH, merged, slope_BTNH, False, _lengths(reaching))
        dq_BTNH, dkv = _wide(*found)
        dk_BSKH, dv_BSKH = (jnp.flip(jnp.where(seeing_BS11, d, 0.0), 1) for d in dkv)
        return jnp.where(seen_BT11, dq_BTNH, 0.0), (dk_BSKH, dv_BSKH)

    def attend_own(self, queries: Queries, keys: Keys) -> Partial:
        """As :class:`Blocks`."""
        if keys.segments_BS is None:
            return _partial(*_forward(queries.q_BTNH, keys.k_BSKH, keys.v_BSKH, True, None))
        return super().attend_own(queries, keys)

    def gradients_own(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """As :class:`Blocks`."""
        if keys.segments_BS is None:
            return _wide(*_backward(queries.q_BTNH, keys.k_BSKH, keys.v_BSKH, merged, slope_BTNH, True, None))
        return super().gradients_own(queries, keys, merged, slope_BTNH)

    def attend_whole(self, queries: Queries, keys: Keys) -> Partial:
        """As :class:`Blocks`."""
        return XlaBlocks().attend(queries, keys)

    def gradients_whole(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """As :class:`Blocks`."""
        return XlaBlocks().gradients(queries, keys, merged, slope_BTNH)


Lengths = tuple[Int[Array, " B"], Int[Array, " B"]]


def _reaching(queries: Queries, keys: Keys) -> Lengths:
    """How many queries and how many keys are of the document that both have; zeros where they have none."""
    assert queries.segments_BT is not None and keys.segments_BS is not None
    document_B1 = queries.segments_BT[:, :1]
    both_B = document_B1[:, 0] == keys.segments_BS[:, -1]
    q_B, k_B = (
        jnp.where(both_B, jnp.sum(x == document_B1, axis=1, dtype=jnp.int32), 0)
        for x in (queries.segments_BT, keys.segments_BS)
    )
    return q_B, k_B


def _lengths(reaching: Lengths) -> Lengths:
    """At least one, since a softmax over nothing is no number."""
    q_B, k_B = (jnp.maximum(n, 1) for n in reaching)
    return q_B, k_B


def _first(x: Array, count_B: Array) -> Array:
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None] < count_B[:, None]


def _partial(out_BTNH: Array, lse_BNT: Array) -> Partial:
    return Partial(out_BTNH.astype(jnp.float32), jnp.swapaxes(lse_BNT, 1, 2))


def _wide(dq_BTNH: Array, dk_BSKH: Array, dv_BSKH: Array) -> Gradients:
    return dq_BTNH.astype(jnp.float32), (dk_BSKH.astype(jnp.float32), dv_BSKH.astype(jnp.float32))


def _forward(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, causal: bool, lengths: Lengths | None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over these keys, and the log-sum-exp of the scores. Only the first ``lengths`` count, if given."""
    # jax.nn.dot_product_attention rounds the log-sum-exp to the dtype of the output.
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    q_B, k_B = (None, None) if lengths is None else lengths
    found: Any = dot_product_attention(
        query=q_BTNH,
        key=k_BSKH,
        value=v_BSKH,
        q_seqlen=q_B,
        kv_seqlen=k_B,
        scale=q_BTNH.shape[3] ** -0.5,
        mask_type=_mask_type(causal, lengths),
        return_residual=True,
    )
    out_BTNH, lse_BNT = found
    return out_BTNH, lse_BNT


def _backward(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    merged: Partial,
    slope_BTNH: Array,
    causal: bool,
    lengths: Lengths | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients by way of these keys, from the attention over all keys.

    Differentiating :func:`_forward` would take the block's own result for the merged one.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    none = jnp.zeros(0, q_BTNH.dtype)
    q_B, k_B = (none, none) if lengths is None else lengths
    dq_BTNH, dk_BSKH, dv_BSKH = fused._dot_product_attention_bwd_p_wrapper.bind(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        none,
        q_B,
        k_B,
        none,
        none,
        none,
        none,
        jnp.swapaxes(merged.lse_BTN, 1, 2),
        merged.out_BTNH.astype(q_BTNH.dtype),
        slope_BTNH.astype(q_BTNH.dtype),
        scale=q_BTNH.shape[3] ** -0.5,
        mask_type=_mask_type(causal, lengths),
        **_backward_settings(),
    )
    return dq_BTNH, dk_BSKH, dv_BSKH


def _mask_type(causal: bool, lengths: Lengths | None) -> Any:
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    if lengths is not None:
        return MaskType.PADDING_CAUSAL if causal else MaskType.PADDING
    return MaskType.CAUSAL if causal else MaskType.NO_MASK


def _backward_settings() -> dict[str, Any]:
    """What jax's operation for the backward pass takes besides arrays, the scale and the mask; it is not public.

    Raises:
      NotImplementedError: this release of jax has another one.
    """
    other = f"jax {jax.__version__}, whose backward pass of cuDNN attention takes other arguments than 0.10 to 0.12"
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        assert fused._dot_product_attention_bwd_p_wrapper is not None
        layout = fused.AttentionLayout.BTNH.value
        arguments = inspect.signature(fused._dot_product_attention_bwd_abstract).parameters.values()
        forward = inspect.signature(fused.dot_product_attention).parameters
    except (ImportError, AttributeError):
        raise NotImplementedError(other) from None
    operands = [each.name for each in arguments if each.kind is each.POSITIONAL_OR_KEYWORD]
    settings = {each.name for each in arguments if each.kind is each.KEYWORD_ONLY}
    if operands != _OPERANDS or settings - {"score_mod"} != _SETTINGS:
        raise NotImplementedError(other)
    found = {
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, and no gradient of one
        "layout": layout,
        "sliding_window_length": None,
    }
    return {**found, "score_mod": None} if "score_mod" in forward else found  # since 0.12

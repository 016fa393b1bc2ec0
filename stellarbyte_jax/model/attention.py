"""Grouped-query attention with rotary embedding and an optional key/value cache.

B batch, T positions, D model, N query heads, K key/value heads, H head size, P = H/2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.cache import KVCache
from stellarbyte_jax.model.layers import RMSNorm, normal, param, residual_std
from stellarbyte_jax.ops.attention import attention, cached_attention
from stellarbyte_jax.ops.rotary import apply_rotary, rotary_angles, xpos_scale


@struct.dataclass
class Place:
    """Where the tokens of a call stand: what every layer needs besides the activations.

    Attributes:
      positions_BT: position of each token in its document.
      segment_ids_BT: document of each token, or None where a row is one document.
      angles_BTP: rotary angles.
      scale_BTP: XPos factors, or None.
      max_segments: static upper bound on the documents of a row.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    angles_BTP: jax.Array
    scale_BTP: jax.Array | None
    max_segments: int | None = struct.field(pytree_node=False, default=None)


def place(
    config: ByteConfig, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, max_segments: int | None
) -> Place:
    """Computes angles and factors once for all layers."""
    scale_BTP = None
    if config.position_embedding == "xpos":
        scale_BTP = xpos_scale(
            positions_BT,
            head_size=config.head_size,
            scale_base=config.xpos_scale_base,
            center=config.max_position_embeddings // 2,
        )
    angles_BTP = rotary_angles(positions_BT, head_size=config.head_size, theta=config.rope_theta)
    return Place(positions_BT, segment_ids_BT, angles_BTP, scale_BTP, max_segments)


class Attention(nn.Module):
    """Causal attention of one layer, whose sliding window and place in the cache are attributes."""

    config: ByteConfig
    window: int | None
    kind: int

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, where: Place, cache: KVCache | None, layer: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, KVCache | None]:
        """Maps [B, T, D] to [B, T, D] and the updated cache."""
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.kv_heads, c.head_size
        dtype = x_BTD.dtype
        init = normal(c.initializer_range)
        q_DNH = param(self, "q", init, embed=D, heads=N, head_dim=H)
        k_DKH = param(self, "k", init, embed=D, kv_heads=K, head_dim=H)
        v_DKH = param(self, "v", init, embed=D, kv_heads=K, head_dim=H)
        o_NHD = param(self, "o", normal(residual_std(c)), heads=N, head_dim=H, embed=D)

        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, q_DNH.astype(dtype))
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, k_DKH.astype(dtype))
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, v_DKH.astype(dtype))
        if c.attention_bias:
            zeros = nn.initializers.zeros
            q_BTNH += param(self, "q_bias", zeros, heads=N, head_dim=H).astype(dtype)[None, None]
            k_BTKH += param(self, "k_bias", zeros, kv_heads=K, head_dim=H).astype(dtype)[None, None]
            v_BTKH += param(self, "v_bias", zeros, kv_heads=K, head_dim=H).astype(dtype)[None, None]
        if c.qk_norm:
            q_BTNH = RMSNorm(c, axis="head_dim", name="q_norm")(q_BTNH)
            k_BTKH = RMSNorm(c, axis="head_dim", name="k_norm")(k_BTKH)
        inverse_BTP = None if where.scale_BTP is None else 1 / where.scale_BTP
        q_BTNH = apply_rotary(q_BTNH, where.angles_BTP, pairing=c.rope_pairing, scale_BTP=where.scale_BTP)
        k_BTKH = apply_rotary(k_BTKH, where.angles_BTP, pairing=c.rope_pairing, scale_BTP=inverse_BTP)

        with jax.named_scope("attend"):
            if cache is not None:
                cache = cache.write(self.kind, layer, k_BTKH, v_BTKH)
            if cache is None or cache.fresh:
                drop = c.attention_dropout > 0 and not deterministic
                out_BTNH = attention(
                    q_BTNH,
                    k_BTKH,
                    v_BTKH,
                    segment_ids_BT=where.segment_ids_BT,
                    window=self.window,
                    logit_softcap=c.attention_logit_softcap,
                    dropout_rate=c.attention_dropout if drop else 0.0,
                    dropout_key=self.make_rng("dropout") if drop else None,
                    max_segments=where.max_segments,
                    implementation=c.attention_implementation,
                )
            else:
                keys_BSKH, values_BSKH = cache.read(self.kind, layer)
                out_BTNH = cached_attention(
                    q_BTNH,
                    keys_BSKH.astype(dtype),
                    values_BSKH.astype(dtype),
                    where.positions_BT,
                    window=self.window,
                    logit_softcap=c.attention_logit_softcap,
                )
        out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, o_NHD.astype(dtype))
        return nn.Dropout(c.residual_dropout, deterministic=deterministic)(out_BTD), cache

"""Grouped-query attention with rotary embedding, segment memory and an optional key/value cache.

B batch, T new positions, M memory slots, D model, N query heads, K key/value heads, H head size, P = H/2.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from stellarbyte_jax.config import ByteConfig, LayerKind
from stellarbyte_jax.model.cache import Plan
from stellarbyte_jax.model.layers import RMSNorm, bias, param, weight
from stellarbyte_jax.model.positions import Rotation, initial_rates, to_keep, turn_kept, turn_together
from stellarbyte_jax.ops.attention import attention, cached_attention


@struct.dataclass
class Place:
    """Where the tokens of a call stand: what every layer needs besides the activations.

    Attributes:
      positions_BT: position of each new token.
      segment_ids_BT: document of each new token, or None where a row is one document.
      rotation: frequencies of the new tokens.
      valid: with a memory, for each kind which of its slots hold something, bool [B, M]; else None.
      memory_slots: with a memory and a cache, for each kind where its slots go in the cache, int32 [B, M]; else None.
      plans: with a cache, for each kind where new tokens go; else None.
      max_segments: static upper bound on the documents of a row.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    rotation: Rotation
    valid: tuple[jax.Array, ...] | None = None
    memory_slots: tuple[jax.Array, ...] | None = None
    plans: tuple[Plan, ...] | None = None
    max_segments: int | None = struct.field(pytree_node=False, default=None)


class Attention(nn.Module):
    """Causal attention of one layer, whose kind and place in the layer pattern are attributes."""

    config: ByteConfig
    kind: LayerKind
    index: int

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        memory_BMD: jax.Array | None,
        where: Place,
        cache: Any,
        layer: jax.Array,
        deterministic: bool,
    ) -> tuple[jax.Array, Any]:
        """Maps [B, T, D] to [B, T, D] and the updated cache. ``memory_BMD`` is treated like earlier inputs."""
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.kv_heads, c.head_size
        dtype = x_BTD.dtype
        q_DNH = param(self, "q", weight(c, "query", D, N * H), embed=D, heads=N, head_dim=H)
        k_DKH = param(self, "k", weight(c, "query", D, K * H), embed=D, kv_heads=K, head_dim=H)
        v_DKH = param(self, "v", weight(c, "value", D, K * H), embed=D, kv_heads=K, head_dim=H)
        o_NHD = param(self, "o", weight(c, "output", N * H, D), heads=N, head_dim=H, embed=D)
        past_BMD = x_BTD if memory_BMD is None else jnp.concatenate([memory_BMD, x_BTD], axis=1)

        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, q_DNH.astype(dtype))
        k_BSKH = jnp.einsum("BTD,DKH->BTKH", past_BMD, k_DKH.astype(dtype))
        v_BSKH = jnp.einsum("BTD,DKH->BTKH", past_BMD, v_DKH.astype(dtype))
        if c.attention_bias:
            q_BTNH += bias(self, "q_bias", dtype, heads=N, head_dim=H)[None, None]
            k_BSKH += bias(self, "k_bias", dtype, kv_heads=K, head_dim=H)[None, None]
            v_BSKH += bias(self, "v_bias", dtype, kv_heads=K, head_dim=H)[None, None]
        if c.qk_norm:
            q_BTNH = RMSNorm(c, axis="head_dim", name="q_norm")(q_BTNH)
            k_BSKH = RMSNorm(c, axis="head_dim", name="k_norm")(k_BSKH)
        rates_P = None
        if c.position_embedding != "rope":
            rates_P = initial_rates(c)
            if c.xpos_learnable:
                rates_P = param(self, "xpos_rate", lambda key, shape, dtype: initial_rates(c), rotary_pairs=H // 2)

        with jax.named_scope("attend"):
            if cache is None or cache.fresh:
                out_BTNH = self._among_themselves(q_BTNH, k_BSKH, v_BSKH, rates_P, where, deterministic)
                if cache is not None:
                    cache = self._remember(cache, layer, k_BSKH, v_BSKH, where)
            else:
                out_BTNH, cache = self._with_cache(q_BTNH, k_BSKH, v_BSKH, rates_P, where, cache, layer)
        out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, o_NHD.astype(dtype))
        if c.attention_output_bias:
            out_BTD += bias(self, "o_bias", dtype, embed=D)[None, None]
        return nn.Dropout(c.residual_dropout, deterministic=deterministic)(out_BTD), cache

    def _among_themselves(self, q_BTNH, k_BSKH, v_BSKH, rates_P, where: Place, deterministic: bool) -> jax.Array:
        """New tokens attend to each other, and to memory as to tokens before them."""
        c, kind = self.config, self.kind
        M = k_BSKH.shape[1] - q_BTNH.shape[1]
        positions_BS, segment_ids_BS, pinned_BS = where.positions_BT, where.segment_ids_BT, None
        max_segments = where.max_segments
        if M:
            assert where.valid is not None
            # One row of memory and new tokens: every kernel can do that. Memory asks nothing, its outputs are cut off.
            q_BTNH = jnp.pad(q_BTNH, ((0, 0), (M, 0), (0, 0), (0, 0)))
            before_BM = positions_BS[:, :1] - M + jnp.arange(M, dtype=jnp.int32)[None, :]
            positions_BS = jnp.concatenate([before_BM, positions_BS], axis=1)
            ids_BT = jnp.ones_like(where.positions_BT) if segment_ids_BS is None else segment_ids_BS
            ids_BM = jnp.where(where.valid[self.index], ids_BT[:, :1], -1)
            segment_ids_BS = jnp.concatenate([ids_BM, ids_BT], axis=1)
            if kind.fused:
                columns_1S = jnp.arange(positions_BS.shape[1])[None, :]
                pinned_BS = jnp.broadcast_to(columns_1S < kind.fused, positions_BS.shape)
            if where.segment_ids_BT is None:
                max_segments = 2
            elif max_segments is not None:
                max_segments += 1
        elif c.sink_tokens and kind.window is not None:
            pinned_BS = positions_BS < c.sink_tokens
        q_BSNH, k_BSKH = turn_together(c, where.rotation, q_BTNH, k_BSKH, positions_BS, rates_P)
        drop = c.attention_dropout > 0 and not deterministic
        out_BSNH = attention(
            q_BSNH,
            k_BSKH,
            v_BSKH,
            segment_ids_BT=segment_ids_BS,
            window=kind.window,
            pinned_BT=pinned_BS,
            logit_softcap=c.attention_logit_softcap,
            prune_below=c.attention_prune_below,
            dropout_rate=c.attention_dropout if drop else 0.0,
            dropout_key=self.make_rng("dropout") if drop else None,
            max_segments=max_segments,
            implementation=c.attention_implementation,
        )
        return out_BSNH[:, M:]

    def _remember(self, cache: Any, layer: jax.Array, k_BSKH, v_BSKH, where: Place) -> Any:
        """Writes memory and the first tokens into the cache."""
        assert where.plans is not None
        T = where.positions_BT.shape[1]
        M = k_BSKH.shape[1] - T
        before_BM = where.positions_BT[:, :1] - M + jnp.arange(M, dtype=jnp.int32)[None, :]
        positions_BS = jnp.concatenate([before_BM, where.positions_BT], axis=1)
        kept_BSKH = to_keep(self.config, where.rotation, k_BSKH, positions_BS)
        if M:
            assert where.memory_slots is not None
            cache = cache.write(self.index, layer, kept_BSKH[:, :M], v_BSKH[:, :M], where.memory_slots[self.index])
        slots_BT = where.plans[self.index].slots_BT
        return cache.write(self.index, layer, kept_BSKH[:, M:], v_BSKH[:, M:], slots_BT)

    def _with_cache(self, q_BTNH, k_BTKH, v_BTKH, rates_P, where: Place, cache: Any, layer: jax.Array):
        """New tokens attend to what is kept, themselves included."""
        c, kind = self.config, self.kind
        assert where.plans is not None
        kept_BTKH = to_keep(c, where.rotation, k_BTKH, where.positions_BT)
        cache, keys_BSKH, values_BSKH, positions_BSK = cache.extend(
            self.index, layer, kept_BTKH, v_BTKH, where.plans[self.index]
        )
        q_BTNH, keys_BSKH = turn_kept(c, where.rotation, q_BTNH, keys_BSKH, where.positions_BT, positions_BSK, rates_P)
        out_BTNH, weights_BKGTS = cached_attention(
            q_BTNH,
            keys_BSKH,
            values_BSKH,
            where.positions_BT,
            positions_BSK,
            window=kind.window,
            pinned_slots=kind.fused,
            sink_tokens=c.sink_tokens,
            logit_softcap=c.attention_logit_softcap,
            prune_below=c.attention_prune_below,
        )
        return out_BTNH, cache.settle(self.index, layer, weights_BKGTS)

"""Grouped-query attention of one layer, over a whole row, a memory or a cache.

B batch, T new positions, M memory slots, S = M + T, D model, N query heads, K key/value heads, H head size, P = H/2.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig, LayerSpec
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.initializers import matrix_init
from stellarbyte_jax.model.io import Aux, LayerState
from stellarbyte_jax.model.linear import linear
from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.model.params import param
from stellarbyte_jax.model.positions import position_scheme
from stellarbyte_jax.model.state.memory import with_memory_prefix
from stellarbyte_jax.ops.attention import Dropout
from stellarbyte_jax.sharding.attention import attention


class Attention(nn.Module):
    """Causal attention of one layer."""

    config: ByteConfig
    spec: LayerSpec

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: LayerContext, state: LayerState
    ) -> tuple[Float[Array, "B T D"], LayerState, Aux]:
        """Maps [B, T, D] to [B, T, D], the state with the updated cache and the layer's losses.

        ``state.memory`` holds normalised inputs of earlier tokens. They have keys and values, but no queries.
        """
        c, spec, cache, memory = self.config, self.spec, state.cache, state.memory
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.kv_heads, c.head_size
        scheme = position_scheme(c)
        query, value = matrix_init(c, "query", D, N * H), matrix_init(c, "value", D, K * H)
        past_BSD = x_BTD if memory is None else jnp.concatenate([memory.states, x_BTD], axis=1)
        M = past_BSD.shape[1] - x_BTD.shape[1]

        project = partial(linear, self, float8=ctx.train and c.matmul_dtype == "float8")
        bias = c.attention_bias
        q_BTNH = project("q", "BTD,DNH->BTNH", x_BTD, query, bias=bias, embed=D, heads=N, head_dim=H)
        key = matrix_init(c, "query", D, K * H)
        k_BSKH = project("k", "BSD,DKH->BSKH", past_BSD, key, bias=bias, embed=D, kv_heads=K, head_dim=H)
        v_BSKH = project("v", "BSD,DKH->BSKH", past_BSD, value, bias=bias, embed=D, kv_heads=K, head_dim=H)
        if c.qk_norm:
            q_BTNH = RMSNorm(c, axis="head_dim", name="q_norm")(q_BTNH)
            k_BSKH = RMSNorm(c, axis="head_dim", name="k_norm")(k_BSKH)
        rates_P, aux = self._rates()

        positions_BS = with_memory_prefix(ctx.positions_BT, M) if M else ctx.positions_BT
        with jax.named_scope("attend"):
            kv = None
            if cache is not None:
                cache, kv = cache.append(scheme.to_cache(ctx.rope, k_BSKH, positions_BS), v_BSKH)
            if kv is None or kv.aligned:  # all keys are new
                rows_BS = with_memory_prefix(ctx.rows_BT, M) if M else ctx.rows_BT
                q_BTNH, k_BSKH = scheme.rotate(ctx.rope, q_BTNH, k_BSKH, positions_BS, rows_BS, rates_P)
            else:
                q_BTNH, k_BSKH = scheme.from_cache(
                    ctx.rope, q_BTNH, kv.keys_BSKH, ctx.positions_BT, kv.positions_BSK, rates_P
                )
                v_BSKH = kv.values_BSKH
            # Keys that the scheme changes after they were stored are read as it made them.
            stored = kv.stored if kv is not None and k_BSKH is kv.keys_BSKH else None
            mask = ctx.mask(spec, memory, c.sink_tokens) if kv is None else kv.mask(ctx.positions_BT, spec.window)
            dropout = None
            if ctx.train and c.attention_dropout > 0:
                dropout = Dropout(c.attention_dropout, self.make_rng("dropout"))
            found = attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                mask,
                softcap=c.attention_logit_softcap,
                prune_below=c.attention_prune_below,
                dropout=dropout,
                return_weights=cache is not None and cache.needs_weights,
                implementation=c.attention_implementation,
                required=mask.aligned,
                dealt=ctx.dealt,
                stored=stored,
            )
            if cache is not None:
                cache = cache.accumulate(found.weights_BKGTS)
        output = matrix_init(c, "output", N * H, D)
        out_BTD = project(
            "o",
            "BTNH,NHD->BTD",
            found.out_BTNH,
            output,
            bias=c.attention_output_bias,
            heads=N,
            head_dim=H,
            embed=D,
        )
        out_BTD = nn.Dropout(c.residual_dropout, deterministic=not ctx.train)(out_BTD)
        return out_BTD, state._replace(cache=cache), aux

    def _rates(self) -> tuple[Float[Array, " P"] | None, Aux]:
        """Rates of decay of the position scheme, and how far learned ones are from those they began with."""
        initial_P = position_scheme(self.config).rates
        if initial_P is None or not self.config.xpos_learnable:
            return initial_P, Aux()
        axes = {"rotary_pairs": initial_P.shape[0]}
        rates_P = param(self, "xpos_rate", lambda key, shape, dtype: initial_P, axes, float32=True)
        return rates_P, Aux.of(losses={"xpos_regularization": jnp.mean(jnp.square(rates_P - initial_P))})

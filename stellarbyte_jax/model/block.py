"""One layer.

B batch, T positions, M memory slots, D model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.config import ByteConfig, LayerSpec
from stellarbyte_jax.model.attention import Attention
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.io import Aux, LayerState
from stellarbyte_jax.model.mlp import MLP
from stellarbyte_jax.model.moe import MoE
from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.model.params import materialise, param
from stellarbyte_jax.model.residual import Branch, Branches, residual_style


class Block(nn.Module):
    """Attention and feed-forward layer in the residual style of ``config``.

    Each branch passes LayerScale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239), the original StellarByte's
    factor ``1 / sqrt(2L)`` and DropPath (Huang et al. 2016, https://arxiv.org/abs/1603.09382), where they are set.
    """

    config: ByteConfig
    spec: LayerSpec

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: LayerContext, state: LayerState, depth: Int[Array, ""]
    ) -> tuple[Float[Array, "B T D"], LayerState, Aux]:
        """Maps [B, T, D] to [B, T, D], the updated state and the layer's losses; ``depth`` counts layers from 0."""
        c = self.config
        attn = Attention(c, self.spec, name="attn")
        if self.spec.moe:
            moe = MoE(c, name="moe")
            feed_forward: Branch = lambda n_BTD, state: moe(n_BTD, ctx, state)  # noqa: E731
        else:
            mlp = MLP(c, name="mlp")
            feed_forward = lambda n_BTD, state: (mlp(n_BTD, ctx.train), state, Aux())  # noqa: E731
        branches = Branches(
            config=c,
            attn_norm=RMSNorm(c, name="attn_norm"),
            mlp_norm=lambda x_BTD: RMSNorm(c, name="mlp_norm")(x_BTD),  # the parallel style has none
            attend=lambda n_BTD, state: attn(n_BTD, ctx, state),
            mlp=feed_forward,
            scale_attn=lambda h_BTD: self._scale(h_BTD, "attn"),
            scale_mlp=lambda h_BTD: self._scale(h_BTD, "mlp"),
            drop=lambda h_BTD: self._drop_path(h_BTD, depth, ctx.train),
        )
        return residual_style(c)(branches, x_BTD, state)

    def _scale(self, h_BTD: jax.Array, name: str) -> jax.Array:
        c = self.config
        if c.layer_scale_init is not None:
            init = nn.initializers.constant(c.layer_scale_init)
            h_BTD *= materialise(param(self, f"{name}_scale", init, {"embed": c.hidden_size}), h_BTD.dtype)[None, None]
        if c.residual_scaling == "branch":
            h_BTD *= (2 * c.num_hidden_layers) ** -0.5
        return h_BTD

    def _drop_path(self, h_BTD: jax.Array, depth: jax.Array, train: bool) -> jax.Array:
        c = self.config
        if c.drop_path == 0 or not train:
            return h_BTD
        keep = 1 - c.drop_path * depth.astype(jnp.float32) / max(1, c.num_hidden_layers - 1)
        keep_mask_B11 = jax.random.bernoulli(self.make_rng("dropout"), keep, (h_BTD.shape[0], 1, 1))
        return jnp.where(keep_mask_B11, h_BTD / keep.astype(h_BTD.dtype), 0)

"""The pieces of a block that are not attention, and the one way to make a weight.

B batch, T positions, D model, F feed-forward, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.ops.norm import rms_norm
from stellarbyte_jax.sharding import LOGICAL_AXES

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

_STELLARBYTE_MLP_EPS = 1e-6


def param(module: nn.Module, name: str, init: nn.initializers.Initializer, **axes: int) -> jax.Array:
    """Makes or reads a float32 weight; each keyword names an axis and gives its size, in order.

    Raises:
      ValueError: an axis is not in ``sharding.LOGICAL_AXES``.
    """
    unknown = [axis for axis in axes if axis not in LOGICAL_AXES]
    if unknown:
        raise ValueError(f"weight {name}: unknown axes {unknown}; known are {', '.join(LOGICAL_AXES)}")
    weight: Any = module.param(name, nn.with_partitioning(init, tuple(axes)), tuple(axes.values()), jnp.float32)
    return weight


def weight(config: ByteConfig, role: str, fan_in: int, fan_out: int) -> nn.initializers.Initializer:
    """The initializer of a matrix by its role: embed, head, query (and key), value, output, mlp_in or mlp_out.

    All are normal. ``"normal"`` has the deviation ``s = initializer_range`` everywhere, ``"depth"`` has
    ``s / sqrt(2L)`` for what writes into the residual stream (output, mlp_out; Radford et al. 2019), ``"stellarbyte"``
    for everything.
    ``"deepnorm"`` has Glorot's ``gain * sqrt(2 / (fan_in + fan_out))`` with the gain ``(8L)^(-1/4)``, but 1 for query
    and key, and s for embed and head (Wang et al. 2022, https://arxiv.org/abs/2203.00555).
    """
    scheme, std, L = config.init_scheme, config.initializer_range, config.num_hidden_layers
    if scheme == "deepnorm" and role not in ("embed", "head"):
        gain = 1.0 if role == "query" else (8 * L) ** -0.25
        std = gain * (2 / (fan_in + fan_out)) ** 0.5
    elif scheme == "stellarbyte" or (scheme == "depth" and role in ("output", "mlp_out")):
        std /= (2 * L) ** 0.5
    return nn.initializers.normal(std)


def bias(module: nn.Module, name: str, dtype: Any, **axes: int) -> jax.Array:
    """A bias that begins with zeros, in the dtype of what it is added to."""
    return param(module, name, nn.initializers.zeros, **axes).astype(dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, whose size and name are the attributes."""

    config: ByteConfig
    axis: str = "embed"
    eps: float | None = None  # another one than the model's

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        scale_D = param(self, "scale", nn.initializers.ones, **{self.axis: x.shape[-1]})
        return rms_norm(x, scale_D, eps=self.eps or self.config.rms_norm_eps, eps_rule=self.config.rms_norm_eps_rule)


class Embed(nn.Module):
    """Token embedding."""

    config: ByteConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the embedded tokens [B, T, D] in the compute dtype, and the table [V, D] for a tied head."""
        c = self.config
        V, D = c.padded_vocab_size, c.hidden_size
        embedding_VD = param(self, "embedding", weight(c, "embed", V, D), vocab=V, embed=D)
        return jnp.take(embedding_VD, tokens_BT, axis=0).astype(c.compute_dtype), embedding_VD


class Head(nn.Module):
    """The linear head of an untied model."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the kernel [D, V]."""
        c = self.config
        D, V = c.hidden_size, c.padded_vocab_size
        return param(self, "kernel", weight(c, "head", D, V), embed=D, vocab=V)


class MLP(nn.Module):
    """Gated feed-forward layer, ``down(act(gate(x)) * up(x))``: SwiGLU or GEGLU by the activation.

    Shazeer 2020, https://arxiv.org/abs/2002.05202. The style "stellarbyte" is the original's
    ``down(silu(up(n)) * sigmoid(gate(n))) + x`` with ``n = RMSNorm(x)`` of a fixed eps.
    """

    config: ByteConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        c = self.config
        D, F = c.hidden_size, c.mlp_size
        dtype = x_BTD.dtype
        gate_up_D2F = param(self, "gate_up", weight(c, "mlp_in", D, F), embed=D, gate=2, mlp=F)
        down_FD = param(self, "down", weight(c, "mlp_out", F, D), mlp=F, embed=D)
        own_style = c.mlp_style == "stellarbyte"
        h_BTD = RMSNorm(c, eps=_STELLARBYTE_MLP_EPS, name="norm")(x_BTD) if own_style else x_BTD
        both_BT2F = jnp.einsum("BTD,DGF->BTGF", h_BTD, gate_up_D2F.astype(dtype))
        if c.mlp_bias:
            both_BT2F += bias(self, "gate_up_bias", dtype, gate=2, mlp=F)[None, None]
        gate_BTF, up_BTF = both_BT2F[:, :, 0], both_BT2F[:, :, 1]
        h_BTF = (
            jax.nn.silu(up_BTF) * jax.nn.sigmoid(gate_BTF)
            if own_style
            else ACTIVATIONS[c.hidden_act](gate_BTF) * up_BTF
        )
        out_BTD = jnp.einsum("BTF,FD->BTD", h_BTF, down_FD.astype(dtype))
        if c.mlp_bias:
            out_BTD += bias(self, "down_bias", dtype, embed=D)[None, None]
        if own_style:
            out_BTD += x_BTD
        return nn.Dropout(c.hidden_dropout, deterministic=deterministic)(out_BTD)

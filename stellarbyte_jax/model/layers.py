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


def normal(std: float) -> nn.initializers.Initializer:
    """Normal initializer with this standard deviation."""
    return nn.initializers.normal(std)


def residual_std(config: ByteConfig) -> float:
    """Deviation of weights that write into the residual stream: it keeps the stream's variance flat over depth."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, whose size and name are the attributes."""

    config: ByteConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        scale_D = param(self, "scale", nn.initializers.ones, **{self.axis: x.shape[-1]})
        return rms_norm(x, scale_D, eps=self.config.rms_norm_eps, eps_rule=self.config.rms_norm_eps_rule)


class Embed(nn.Module):
    """Token embedding."""

    config: ByteConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the embedded tokens [B, T, D] in the compute dtype, and the table [V, D] for a tied head."""
        c = self.config
        embedding_VD = param(self, "embedding", normal(c.initializer_range), vocab=c.vocab_size, embed=c.hidden_size)
        return jnp.take(embedding_VD, tokens_BT, axis=0).astype(c.compute_dtype), embedding_VD


class Head(nn.Module):
    """The linear head of an untied model."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the kernel [D, V]."""
        c = self.config
        return param(self, "kernel", normal(c.initializer_range), embed=c.hidden_size, vocab=c.vocab_size)


class MLP(nn.Module):
    """Gated feed-forward layer, ``down(act(gate(x)) * up(x))``: SwiGLU or GEGLU by the activation.

    Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    config: ByteConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        c = self.config
        dtype = x_BTD.dtype
        gate_up_D2F = param(self, "gate_up", normal(c.initializer_range), embed=c.hidden_size, gate=2, mlp=c.mlp_size)
        down_FD = param(self, "down", normal(residual_std(c)), mlp=c.mlp_size, embed=c.hidden_size)
        both_BT2F = jnp.einsum("BTD,DGF->BTGF", x_BTD, gate_up_D2F.astype(dtype))
        h_BTF = ACTIVATIONS[c.hidden_act](both_BT2F[:, :, 0]) * both_BT2F[:, :, 1]
        out_BTD = jnp.einsum("BTF,FD->BTD", h_BTF, down_FD.astype(dtype))
        return nn.Dropout(c.hidden_dropout, deterministic=deterministic)(out_BTD)

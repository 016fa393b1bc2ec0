"""The token embedding and the head.

B batch, T tokens, D model, V rows of the vocabulary with padding.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.initializers import matrix_init
from stellarbyte_jax.model.params import kernel, param


class Embed(nn.Module):
    """Token embedding."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        """The table, float32 as it is stored."""
        c = self.config
        V, D = c.padded_vocab_size, c.hidden_size
        return param(self, "embedding", matrix_init(c, "embed", V, D), {"vocab": V, "embed": D}, lookup=True)


def look_up(config: ByteConfig, table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embedded tokens in the compute dtype."""
    return jnp.take(table_VD, tokens_BT, axis=0).astype(config.compute_dtype)


class Head(nn.Module):
    """The matrix of an untied head."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        """In the compute dtype."""
        c = self.config
        D, V = c.hidden_size, c.padded_vocab_size
        init = matrix_init(c, "head", D, V)
        return kernel(self, "kernel", "...D,DV->...V", jnp.dtype(c.compute_dtype), init, embed=D, vocab=V)

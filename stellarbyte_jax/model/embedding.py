"""The token embedding and the head.

B batch, T tokens, D model, V rows of the vocabulary with padding.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.initializers import matrix_init
from stellarbyte_jax.model.params import kernel, linear, materialise, param, product
from stellarbyte_jax.sharding import current_mesh, gather
from stellarbyte_jax.sharding.lookup import look_up

_LOGITS = "...D,DV->...V"


class Embed(nn.Module):
    """Token embedding, and the head that is tied to it."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        """The table as it is stored."""
        c = self.config
        V, D = c.padded_vocab_size, c.hidden_size
        return param(self, "embedding", matrix_init(c, "embed", V, D), {"vocab": V, "embed": D}, lookup=True)

    def look_up(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embedded tokens in the compute dtype."""
        if current_mesh() is None:  # fewer numbers are cast
            return materialise(jnp.take(self(), tokens_BT, axis=0), self.config.compute_dtype)
        return look_up(materialise(self(), self.config.compute_dtype), tokens_BT)

    def kernel(self) -> Float[Array, "D V"]:
        """The matrix of the tied head, in the compute dtype."""
        return gather(materialise(self(), self.config.compute_dtype), ("vocab", "embed")).T

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits of the tied head."""
        return product(_LOGITS, hidden, self.kernel(), {"D": "embed", "V": "vocab"}, jnp.dtype(jnp.float32))


class Head(nn.Module):
    """A head with a matrix of its own."""

    config: ByteConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch D"] | None) -> Float[Array, "*batch V"]:
        """float32 logits; of None the matrix [D, V] in the compute dtype, for a loss that makes no logits."""
        c = self.config
        D, V = c.hidden_size, c.padded_vocab_size
        init = matrix_init(c, "head", D, V)
        if hidden is None:
            return kernel(self, "kernel", _LOGITS, jnp.dtype(c.compute_dtype), init, embed=D, vocab=V)
        return linear(self, "kernel", _LOGITS, hidden, init, out_dtype=jnp.dtype(jnp.float32), embed=D, vocab=V)

    def kernel(self) -> Float[Array, "D V"]:
        """The matrix, in the compute dtype."""
        return self(None)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits."""
        return self(hidden)

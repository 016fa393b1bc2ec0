"""The token embedding and the head.

B batch, T tokens, D model, V rows of the vocabulary with padding.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.initializers import matrix_init
from stellarbyte_jax.model.linear import kernel, linear, low_rank_factors
from stellarbyte_jax.model.lora import RANK, LookupAdapter, LowRank, lookup_adapter
from stellarbyte_jax.model.params import materialise, param, product
from stellarbyte_jax.model.trees import Open
from stellarbyte_jax.sharding import current_mesh, gather
from stellarbyte_jax.sharding.lookup import look_up

_LOGITS = "...D,DV->...V"


class Embed(nn.Module):
    """Token embedding, and the head that is tied to it."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "V D"], LookupAdapter | None]:
        """The table as it is stored, and its adapter."""
        c = self.config
        V, D = c.padded_vocab_size, c.hidden_size
        table_VD = param(self, "embedding", matrix_init(c, "embed", V, D), {"vocab": V, "embed": D}, lookup=True)
        return table_VD, lookup_adapter(self, "embedding", V, D)

    def look_up(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embedded tokens in the compute dtype."""
        table_VD, adapter = self()
        rows_BTD = self._rows(table_VD, tokens_BT)
        return rows_BTD if adapter is None else rows_BTD + adapter.of_rows(self._adapter_rows(adapter.a_VR, tokens_BT))

    def _adapter_rows(self, a: Float[Array, "*batch V R"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T R"]:
        if a.ndim == 2:
            return self._rows(a, tokens_BT, RANK)
        return materialise(jnp.take_along_axis(a, tokens_BT[:, :, None], axis=1), self.config.compute_dtype)

    def _rows(
        self, table: Float[Array, "V _"], tokens_BT: Int[Array, "B T"], axis: str = "embed"
    ) -> Float[Array, "B T _"]:
        if current_mesh() is None:  # fewer numbers are cast
            return materialise(jnp.take(table, tokens_BT, axis=0), self.config.compute_dtype)
        return look_up(materialise(table, self.config.compute_dtype), tokens_BT, ("vocab", axis))

    def kernel(self) -> Float[Array, "D V"]:
        """The matrix of the tied head, in the compute dtype."""
        table_VD, adapter = self()
        return self._matrix(table_VD if adapter is None else adapter.merged(table_VD))

    def factors(self, hidden: Float[Array, "*batch D"]) -> tuple[Float[Array, "D V"], LowRank | None]:
        """The matrix of the tied head without its adapter, and what that adds to the logits."""
        table_VD, adapter = self()
        return self._matrix(table_VD), None if adapter is None else adapter.of_head(hidden)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits of the tied head."""
        float32 = jnp.dtype(jnp.float32)
        table_VD, adapter = self()
        logits = product(_LOGITS, hidden, self._matrix(table_VD), {"D": "embed", "V": "vocab"}, float32)
        return logits if adapter is None else adapter.added(logits, hidden)

    def _matrix(self, table_VD: Float[Array, "V D"]) -> Float[Array, "D V"]:
        return gather(materialise(table_VD, self.config.compute_dtype), ("vocab", "embed")).T


class Head(nn.Module):
    """A head with a matrix of its own."""

    config: ByteConfig

    @nn.compact
    def __call__(self, use: Callable[..., Open], x: Open, **options: Open) -> Open:
        """What one of the functions of ``model.linear`` makes of the matrix."""
        c = self.config
        D, V = c.hidden_size, c.padded_vocab_size
        return use(self, "kernel", _LOGITS, x, matrix_init(c, "head", D, V), **options, embed=D, vocab=V)

    def kernel(self) -> Float[Array, "D V"]:
        """The matrix, in the compute dtype."""
        return self(kernel, jnp.dtype(self.config.compute_dtype))

    def factors(self, hidden: Float[Array, "*batch D"]) -> tuple[Float[Array, "D V"], LowRank | None]:
        """The matrix without its adapter, and what that adds to the logits: for a loss that makes none."""
        return self(low_rank_factors, hidden)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits."""
        return self(linear, hidden, out_dtype=jnp.dtype(jnp.float32))

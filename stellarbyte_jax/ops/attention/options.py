"""Arguments and result of every attention implementation.

B batch, T queries, S keys, N query heads, K key/value heads, G = N/K, H head size.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, PRNGKeyArray

from stellarbyte_jax.ops.stored import Stored


class Dropout(NamedTuple):
    """Share of the attention weights that are set to zero, and the key that chooses them."""

    rate: float
    key: PRNGKeyArray


class Options(NamedTuple):
    """What an implementation is asked for besides plain masked attention.

    Attributes:
      softcap: replaces scores s by ``softcap * tanh(s / softcap)``.
      prune_below: weights below this fraction of a query's largest weight are set to zero.
      dropout: None for none.
      return_weights: whether the weights are wanted.
      return_lse: whether the log-sum-exp is wanted.
      stored: the same keys and values where a cache holds them, for kernels that read them there; None for none.
    """

    softcap: float | None = None
    prune_below: float = 0.0
    dropout: Dropout | None = None
    return_weights: bool = False
    return_lse: bool = False
    stored: Stored | None = None


class AttentionOutput(NamedTuple):
    """Result of attention.

    Attributes:
      out_BTNH: weighted sums of the values, in the dtype of the values.
      weights_BKGTS: float32 weights before dropout; None where not asked for.
      lse_BTN: float32 log-sum-exp of the scores that each query sees; None where not asked for.
    """

    out_BTNH: Float[Array, "B T N H"]
    weights_BKGTS: Float[Array, "B K G T S"] | None = None
    lse_BTN: Float[Array, "B T N"] | None = None

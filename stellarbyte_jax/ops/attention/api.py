"""The attention operation, and the choice of its implementation.

B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from stellarbyte_jax.ops.attention.cudnn import cudnn_attention
from stellarbyte_jax.ops.attention.mask import Mask
from stellarbyte_jax.ops.attention.options import AttentionOutput, Dropout, Options
from stellarbyte_jax.ops.attention.pallas import pallas_attention
from stellarbyte_jax.ops.attention.reference import reference_attention
from stellarbyte_jax.ops.attention.xla import xla_attention
from stellarbyte_jax.ops.dispatch import dispatch
from stellarbyte_jax.ops.stored import Stored

Implementation = Callable[[Array, Array, Array, Mask, Options], AttentionOutput]

# In the order in which "auto" tries them; the reference refuses nothing, so that what stands behind it is taken by name
# alone. Another kernel is another entry.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "cudnn": cudnn_attention,
    "xla": xla_attention,
    "reference": reference_attention,
    "pallas": pallas_attention,
}


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    softcap: float | None = None,
    prune_below: float = 0.0,
    dropout: Dropout | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    stored: Stored | None = None,
    implementation: str = "auto",
    required: bool = True,
) -> AttentionOutput:
    """``softmax(q k^T / sqrt(H)) v`` over the keys that ``mask`` allows, with the softmax in float32.

    Query head n reads key/value head ``n // (N / K)``. A query that sees no key gives finite numbers without meaning.

    Args:
      q_BTNH: queries, already rotated.
      k_BSKH: keys; K divides N.
      v_BSKH: values.
      mask: what sees what.
      softcap: replaces scores s by ``softcap * tanh(s / softcap)``.
      prune_below: weights below this fraction of a query's largest weight are set to zero.
      dropout: of the weights.
      return_weights: whether to return the weights.
      return_lse: whether to return the log-sum-exp of the scores.
      stored: the same keys and values where a cache holds them, for kernels that read them there.
      implementation: ``"auto"`` or a name in ``IMPLEMENTATIONS``.
      required: False lets another implementation take what the named one refuses, and logs that.

    Raises:
      NotImplementedError: the implementation named does not support the arguments.
    """
    options = Options(softcap, prune_below, dropout, return_weights, return_lse, stored)
    cached, known = "" if mask.aligned else " over a cache", IMPLEMENTATIONS
    if cached and implementation == "auto" and jax.default_backend() == "cpu":
        # On a CPU the reference decodes faster (benchmarks/cache.json).
        known = {name: function for name, function in known.items() if function is not xla_attention}
    return dispatch(
        f"attention{cached}", implementation, known, q_BTNH, k_BSKH, v_BSKH, mask, options, required=required
    )

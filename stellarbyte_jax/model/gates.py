"""Gates: what a router thinks of each expert for each token, one function a gate.

B batch, T positions, D model, E experts, C features of the context, Q all features, I inside.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.linear import linear
from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.model.params import materialise, param
from stellarbyte_jax.ops.running_mean import running_mean


class Seen(NamedTuple):
    """What a gate sees.

    Attributes:
      x_BTD: tokens, normalised.
      ctx: of the call.
      history_BD: running mean of the tokens before the first one, float32; None: there are none.
    """

    x_BTD: Array
    ctx: LayerContext
    history_BD: Array | None


Gate = Callable[[nn.Module, ByteConfig, Seen], tuple[jax.Array, Array | None]]


def linear_gate(module: nn.Module, config: ByteConfig, seen: Seen) -> tuple[Float[Array, "B T E"], None]:
    """``x W`` in float32."""
    return _linear(module, config, "kernel", seen.x_BTD, embed=config.hidden_size, routed=config.moe.num_experts), None


def context_gate(
    module: nn.Module, config: ByteConfig, seen: Seen
) -> tuple[Float[Array, "B T E"], Float[Array, "B D"] | None]:
    """The original's gate: ``(z + mlp(z)) W`` with ``z = norm([token, context, position, history])``, in float32.

    The context is a small network's view of the token, the position a learned vector (of the last one, behind the
    longest text), the history the running mean of the earlier tokens of the document.

    Returns:
      Logits, and the history after the last token.
    """
    c = config.moe
    C, I = c.context_size, c.gate_intermediate_size or c.context_size  # noqa: E741
    x_BTD, ctx = seen.x_BTD.astype(jnp.float32), seen.ctx
    h_BTI = _linear(module, config, "context_in", x_BTD, embed=config.hidden_size, gate_inside=I)
    h_BTI = jax.nn.gelu(h_BTI, approximate=False)
    context_BTC = _linear(module, config, "context_out", h_BTI, gate_inside=I, gate_features=C)
    shape = {"positions": config.max_position_embeddings, "gate_features": max(1, C // 2)}
    init = nn.initializers.normal(config.initializer_range)
    table_PC = materialise(param(module, "position", init, shape, lookup=True, float32=True), "float32")
    features = [x_BTD, context_BTC, table_PC[jnp.minimum(ctx.positions_BT, config.max_position_embeddings - 1)]]
    history_BD = None
    if c.history_decay:
        before_BD = jnp.zeros(x_BTD[:, 0].shape) if seen.history_BD is None else seen.history_BD
        earlier_BTD, history_BD = running_mean(x_BTD, ctx.starts, ctx.tokens, before_BD, c.history_decay)
        features.append(earlier_BTD)
    z_BTQ = RMSNorm(config, axis="gate_features", name="norm")(jnp.concatenate(features, axis=-1))
    Q = z_BTQ.shape[-1]
    gate_BTI, up_BTI = (
        _linear(module, config, name, z_BTQ, gate_features=Q, gate_inside=I) for name in ("mlp_gate", "mlp_up")
    )
    z_BTQ += _linear(module, config, "mlp_down", jax.nn.silu(gate_BTI) * up_BTI, gate_inside=I, gate_features=Q)
    return _linear(module, config, "kernel", z_BTQ, gate_features=Q, routed=c.num_experts), history_BD


GATES: dict[str, Gate] = {"linear": linear_gate, "context": context_gate}


def _linear(module: nn.Module, config: ByteConfig, name: str, x: jax.Array, **axes: int) -> jax.Array:
    init = nn.initializers.normal(config.initializer_range)
    return linear(
        module, name, "BTQ,QI->BTI", x, init, bias=False, batch=(), out_dtype=None, float32=True, float8=False, **axes
    )

"""Our side of ``benchmark moe_layer``.

B = 1 row, T tokens, D model.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stellarbyte_jax.cli.layer_speed import Layer, Result, figures, timed
from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.launch import environment
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.io import LayerState
from stellarbyte_jax.model.moe import MoE


def measure_layer(config: ByteConfig, shape: Layer, calls: int) -> Result:
    """Figures of the layer, and the bytes that its forward pass keeps of a token.

    Args:
      config: of a network whose layers have the shape.
      shape: of the layer.
      calls: of a repeat.
    """
    layer, positions_BT = MoE(config), jnp.arange(shape.tokens, dtype=jnp.int32)[None]
    no_rope: Any = None  # attention's alone
    ctx = LayerContext(positions_BT, positions_BT, None, no_rope, train=True)
    x_BTD, d_BTD = (
        jax.random.normal(jax.random.key(seed), (1, shape.tokens, shape.hidden), config.compute_dtype)
        for seed in (1, 2)
    )
    params = nn.meta.unbox(jax.jit(lambda x: layer.init(jax.random.key(0), x, ctx, LayerState())["params"])(x_BTD))
    experts = jax.tree.map(lambda w: w.astype(config.compute_dtype), params["experts"])
    params = {**params, "experts": experts}  # as a mixed optimizer has them; the router's stay float32

    def forward(params: Any, x_BTD: jax.Array) -> Any:
        return jax.vjp(lambda params, x: layer.apply({"params": params}, x, ctx, LayerState())[0], params, x_BTD)

    def both(params: Any, x_BTD: jax.Array, d_BTD: jax.Array) -> Any:
        y_BTD, back = forward(params, x_BTD)
        return y_BTD, back(d_BTD)

    kept = jax.tree.leaves(jax.eval_shape(forward, params, x_BTD)[1])
    weights = {w.shape for w in jax.tree.leaves(params)}
    bytes_kept = sum(x.size * x.dtype.itemsize for x in kept if x.shape not in weights)
    ahead, whole = _repeated(jax.jit(forward), params, x_BTD), _repeated(jax.jit(both), params, x_BTD, d_BTD)
    return {
        **figures(shape, timed(ahead, calls), timed(whole, calls), jax.devices()[0].device_kind),
        "kept_bytes_of_a_token": round(bytes_kept / shape.tokens),
        "on": environment(),
    }


def _repeated(run: Callable[..., Any], *arrays: Any) -> Callable[[int], None]:
    jax.block_until_ready(run(*arrays))

    def repeat(calls: int) -> None:
        out = None
        for _ in range(calls):
            out = run(*arrays)
        jax.block_until_ready(out)

    return repeat

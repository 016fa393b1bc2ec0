"""Our side of ``benchmark moe_layer``.

B = 1 row, T tokens, D model.
"""

from collections.abc import Callable
from typing import Any, cast

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
    layer, no_rope = MoE(config), cast(Any, None)  # attention's alone

    def given(x_BTD: jax.Array) -> tuple[Any, ...]:
        positions_BT = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
        return x_BTD, LayerContext(positions_BT, positions_BT, None, no_rope, train=True), LayerState()

    x_BTD, d_BTD = (
        jax.random.normal(jax.random.key(seed), (1, shape.tokens, shape.hidden), config.compute_dtype)
        for seed in (1, 2)
    )
    params = nn.meta.unbox(jax.jit(lambda x: layer.init(jax.random.key(0), *given(x))["params"])(x_BTD))
    experts = jax.tree.map(lambda w: w.astype(config.compute_dtype), params["experts"])
    params = {**params, "experts": experts}  # as a mixed optimizer has them; the router's stay float32

    def forward(params: Any, x_BTD: jax.Array) -> Any:
        return jax.vjp(lambda params, x: layer.apply({"params": params}, *given(x))[0], params, x_BTD)

    def both(params: Any, x_BTD: jax.Array, d_BTD: jax.Array) -> Any:
        y_BTD, back = forward(params, x_BTD)
        return y_BTD, back(d_BTD)

    own = kept_of_tokens(forward, params, x_BTD)

    def ahead_alone(params: Any, x_BTD: jax.Array) -> Any:
        y_BTD, back = forward(params, x_BTD)
        return y_BTD, [kept for number, kept in enumerate(jax.tree.leaves(back)) if number in own]

    ahead, whole = _repeated(jax.jit(ahead_alone), params, x_BTD), _repeated(jax.jit(both), params, x_BTD, d_BTD)
    return {
        **figures(shape, timed(ahead, calls), timed(whole, calls), jax.devices()[0].device_kind),
        "kept_bytes_of_a_token": round((x_BTD.nbytes + sum(own.values())) / shape.tokens),
        "on": environment(),
    }


def kept_of_tokens(forward: Callable[..., Any], params: Any, x_BTD: jax.Array) -> dict[int, int]:
    """What a forward pass keeps of tokens but these themselves: numbers among the leaves of all, and bytes.

    Weights and tokens are kept in other shapes too. Of these a whole step makes no copy, but a program that returned
    them would.

    Args:
      forward: from weights and tokens to the result and what the backward pass needs.
      params: weights.
      x_BTD: tokens.
    """

    def kept(tokens: int) -> list[Any]:
        x = jax.ShapeDtypeStruct((1, tokens, x_BTD.shape[2]), x_BTD.dtype)
        return jax.tree.leaves(jax.eval_shape(forward, params, x)[1])

    few, many = (kept(tokens) for tokens in (x_BTD.shape[1], 2 * x_BTD.shape[1]))
    return {
        number: a.size * a.dtype.itemsize
        for number, (a, b) in enumerate(zip(few, many, strict=True))
        if a.shape != b.shape and (a.size, a.dtype) != (x_BTD.size, x_BTD.dtype)
    }


def _repeated(run: Callable[..., Any], *arrays: Any) -> Callable[[int], None]:
    jax.block_until_ready(run(*arrays))

    def repeat(calls: int) -> None:
        out = None
        for _ in range(calls):
            out = run(*arrays)
        jax.block_until_ready(out)

    return repeat

"""Residual styles: how a block joins attention and feed-forward layer to the stream, one function a style.

B batch, T positions, M memory slots, D model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.io import Aux
from stellarbyte_jax.model.state.layer_cache import LayerCache

Stream = Float[Array, "B T D"]
Memory = Float[Array, "B M D"] | None
Carried = tuple[LayerCache | None, Aux]  # what attention gives besides activations
Style = Callable[["Branches", jax.Array, jax.Array | None], tuple[jax.Array, Carried]]


class Branches(NamedTuple):
    """The pieces of a block, as functions of activations [B, T, D].

    Attributes:
      config: of the model.
      attn_norm: the first norm.
      mlp_norm: the second one, where the style has it.
      attend: attention, of activations and of memory as they are or normalised, as the style wants.
      mlp: the feed-forward layer.
      scale_attn: LayerScale and branch factor of attention's result.
      scale_mlp: the same for the feed-forward layer's.
      drop: DropPath.
    """

    config: ByteConfig
    attn_norm: Callable[[jax.Array], jax.Array]
    mlp_norm: Callable[[jax.Array], jax.Array]
    attend: Callable[[jax.Array, jax.Array | None], tuple[jax.Array, Carried]]
    mlp: Callable[[jax.Array], jax.Array]
    scale_attn: Callable[[jax.Array], jax.Array]
    scale_mlp: Callable[[jax.Array], jax.Array]
    drop: Callable[[jax.Array], jax.Array]

    def attend_normalised(self, n_BTD: jax.Array, memory_BMD: jax.Array | None) -> tuple[jax.Array, Carried]:
        """Attention to memory through the first norm, like the stream: memory holds inputs of the layer."""
        return self.attend(n_BTD, None if memory_BMD is None else self.attn_norm(memory_BMD))


def sequential(b: Branches, x_BTD: Stream, memory_BMD: Memory) -> tuple[Stream, Carried]:
    """``x = x + attn(norm(x))``, then ``x = x + mlp(norm(x))``."""
    h_BTD, carried = b.attend_normalised(b.attn_norm(x_BTD), memory_BMD)
    x_BTD = x_BTD + b.drop(b.scale_attn(h_BTD))
    return x_BTD + b.drop(b.scale_mlp(b.mlp(b.mlp_norm(x_BTD)))), carried


def parallel(b: Branches, x_BTD: Stream, memory_BMD: Memory) -> tuple[Stream, Carried]:
    """``n = norm(x); x = x + attn(n) + mlp(n)`` (Wang and Komatsuzaki 2021, GPT-J)."""
    n_BTD = b.attn_norm(x_BTD)
    h_BTD, carried = b.attend_normalised(n_BTD, memory_BMD)
    return x_BTD + b.drop(b.scale_attn(h_BTD) + b.scale_mlp(b.mlp(n_BTD))), carried


def deepnorm(b: Branches, x_BTD: Stream, memory_BMD: Memory) -> tuple[Stream, Carried]:
    """``x = norm(a x + attn(x))``, then ``x = norm(a x + mlp(x))`` with ``a = (2L)^(1/4)``.

    Wang et al. 2022, https://arxiv.org/abs/2203.00555.
    """
    alpha = (2 * b.config.num_hidden_layers) ** 0.25
    h_BTD, carried = b.attend(x_BTD, memory_BMD)
    x_BTD = b.attn_norm(alpha * x_BTD + b.drop(b.scale_attn(h_BTD)))
    return b.mlp_norm(alpha * x_BTD + b.drop(b.scale_mlp(b.mlp(x_BTD)))), carried


def residual_style(config: ByteConfig) -> Style:
    """The style that ``config`` asks for."""
    if config.residual_scaling == "deepnorm":
        return deepnorm
    return parallel if config.parallel_residual else sequential

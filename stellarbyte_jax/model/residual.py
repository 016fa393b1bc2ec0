"""Residual styles: how a block joins attention and feed-forward layer to the stream, one function a style.

B batch, T positions, M memory slots, D model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.io import Aux, LayerState

Stream = Float[Array, "B T D"]
Branch = Callable[[jax.Array, LayerState], tuple[jax.Array, LayerState, Aux]]
Style = Callable[["Branches", jax.Array, LayerState], tuple[jax.Array, LayerState, Aux]]


class Branches(NamedTuple):
    """The pieces of a block, as functions of activations [B, T, D].

    Attributes:
      config: of the model.
      attn_norm: the first norm.
      mlp_norm: the second one, where the style has it.
      attend: attention. The memory in its state is as it is or normalised, as the style wants.
      mlp: the feed-forward layer.
      scale_attn: LayerScale and branch factor of attention's result.
      scale_mlp: the same for the feed-forward layer's.
      drop: DropPath.
    """

    config: ByteConfig
    attn_norm: Callable[[jax.Array], jax.Array]
    mlp_norm: Callable[[jax.Array], jax.Array]
    attend: Branch
    mlp: Branch
    scale_attn: Callable[[jax.Array], jax.Array]
    scale_mlp: Callable[[jax.Array], jax.Array]
    drop: Callable[[jax.Array], jax.Array]

    def attend_normalised(self, n_BTD: jax.Array, state: LayerState) -> tuple[jax.Array, LayerState, Aux]:
        """Attention to memory through the first norm, like the stream: memory holds inputs of the layer."""
        memory = state.memory
        if memory is not None:
            memory = memory.replace(states=self.attn_norm(memory.states))  # type: ignore[attr-defined]
        return self.attend(n_BTD, state._replace(memory=memory))


def sequential(b: Branches, x_BTD: Stream, state: LayerState) -> tuple[Stream, LayerState, Aux]:
    """``x = x + attn(norm(x))``, then ``x = x + mlp(norm(x))``."""
    h_BTD, state, aux = b.attend_normalised(b.attn_norm(x_BTD), state)
    x_BTD = x_BTD + b.drop(b.scale_attn(h_BTD))
    h_BTD, state, more = b.mlp(b.mlp_norm(x_BTD), state)
    return x_BTD + b.drop(b.scale_mlp(h_BTD)), state, aux + more


def parallel(b: Branches, x_BTD: Stream, state: LayerState) -> tuple[Stream, LayerState, Aux]:
    """``n = norm(x); x = x + attn(n) + mlp(n)`` (Wang and Komatsuzaki 2021, GPT-J)."""
    n_BTD = b.attn_norm(x_BTD)
    attn_BTD, state, aux = b.attend_normalised(n_BTD, state)
    mlp_BTD, state, more = b.mlp(n_BTD, state)
    return x_BTD + b.drop(b.scale_attn(attn_BTD) + b.scale_mlp(mlp_BTD)), state, aux + more


def deepnorm(b: Branches, x_BTD: Stream, state: LayerState) -> tuple[Stream, LayerState, Aux]:
    """``x = norm(a x + attn(x))``, then ``x = norm(a x + mlp(x))`` with ``a = (2L)^(1/4)``.

    Wang et al. 2022, https://arxiv.org/abs/2203.00555.
    """
    alpha = (2 * b.config.num_hidden_layers) ** 0.25
    h_BTD, state, aux = b.attend(x_BTD, state)
    x_BTD = b.attn_norm(alpha * x_BTD + b.drop(b.scale_attn(h_BTD)))
    h_BTD, state, more = b.mlp(x_BTD, state)
    return b.mlp_norm(alpha * x_BTD + b.drop(b.scale_mlp(h_BTD))), state, aux + more


def residual_style(config: ByteConfig) -> Style:
    """The style that ``config`` asks for."""
    if config.residual_scaling == "deepnorm":
        return deepnorm
    return parallel if config.parallel_residual else sequential

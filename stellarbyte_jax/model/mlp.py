"""Feed-forward layers: one function a style.

B batch, T positions, D model, F feed-forward.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.initializers import matrix_init
from stellarbyte_jax.model.linear import linear
from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.ops.activations import ACTIVATIONS

_STELLARBYTE_EPS = 1e-6


class MLP(nn.Module):
    """The feed-forward layer of ``config.mlp_style``."""

    config: ByteConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], train: bool) -> Float[Array, "B T D"]:
        """Maps [B, T, D] to [B, T, D]; ``train`` switches dropout on."""
        float8 = train and self.config.matmul_dtype == "float8"
        out_BTD = MLP_STYLES[self.config.mlp_style](self, x_BTD, float8)
        return nn.Dropout(self.config.hidden_dropout, deterministic=not train)(out_BTD)


def gated(mlp: MLP, x_BTD: Float[Array, "B T D"], float8: bool) -> Float[Array, "B T D"]:
    """``down(act(gate(x)) * up(x))``: SwiGLU or GEGLU by the activation. Shazeer 2020, https://arxiv.org/abs/2002.05202."""
    gate_BTF, up_BTF = gate_and_up(mlp, mlp.config, x_BTD, mlp.config.mlp_size, float8)
    return project_down(mlp, mlp.config, ACTIVATIONS[mlp.config.hidden_act](gate_BTF) * up_BTF, float8)


def stellarbyte(mlp: MLP, x_BTD: Float[Array, "B T D"], float8: bool) -> Float[Array, "B T D"]:
    """The original's ``down(silu(up(n)) * sigmoid(gate(n))) + x`` with ``n = RMSNorm(x)`` of a fixed eps."""
    n_BTD = RMSNorm(mlp.config, eps=_STELLARBYTE_EPS, name="norm")(x_BTD)
    gate_BTF, up_BTF = gate_and_up(mlp, mlp.config, n_BTD, mlp.config.mlp_size, float8)
    return project_down(mlp, mlp.config, jax.nn.silu(up_BTF) * jax.nn.sigmoid(gate_BTF), float8) + x_BTD


MLP_STYLES: dict[str, Callable[[MLP, jax.Array, bool], jax.Array]] = {"gated": gated, "stellarbyte": stellarbyte}


def gate_and_up(
    module: nn.Module, config: ByteConfig, x_BTD: Float[Array, "B T D"], size: int, float8: bool
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """The two projections into an MLP of a size, with one weight of the module; ``float8`` as for :func:`linear`."""
    D, F = config.hidden_size, size
    init = matrix_init(config, "mlp_in", D, F)
    both_BTGF = linear(
        module,
        "gate_up",
        "BTD,DGF->BTGF",
        x_BTD,
        init,
        bias=config.mlp_bias,
        batch=("gate",),
        float8=float8,
        embed=D,
        gate=2,
        mlp=F,
    )
    return both_BTGF[:, :, 0], both_BTGF[:, :, 1]


def project_down(
    module: nn.Module, config: ByteConfig, h_BTF: Float[Array, "B T F"], float8: bool
) -> Float[Array, "B T D"]:
    """The projection out of an MLP, with a weight of the module."""
    D, F = config.hidden_size, h_BTF.shape[-1]
    init = matrix_init(config, "mlp_out", F, D)
    return linear(module, "down", "BTF,FD->BTD", h_BTF, init, bias=config.mlp_bias, float8=float8, mlp=F, embed=D)

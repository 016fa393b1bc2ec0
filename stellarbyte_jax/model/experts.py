"""Gated MLPs of experts: their weights, and the ways to compute them for tokens that chose them.

N tokens, D model, F inside an expert, E experts, K choices a token, S rows in the order of experts.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.initializers import matrix_init
from stellarbyte_jax.model.linear import factors
from stellarbyte_jax.model.lora import Factors
from stellarbyte_jax.ops.activations import ACTIVATIONS
from stellarbyte_jax.ops.dispatch import dispatch
from stellarbyte_jax.ops.expert_layout import (
    Layout,
    block_rows,
    from_experts,
    lay_out,
    lay_out_unaligned,
    part_of,
    parts_of,
    rows_of_share,
    to_experts,
)
from stellarbyte_jax.ops.expert_mlp import expert_mlp
from stellarbyte_jax.ops.grouped_matmul import Groups, grouped_matmul, kernels_refusal, scale_by_group
from stellarbyte_jax.ops.parts import sum_of_parts

_KERNELS = "pallas"
_Inputs = tuple[Array, tuple[Factors, Factors], Array]  # tokens, weights of experts, weights of choices
_ByExperts = Callable[[ByteConfig, _Inputs, Layout, jnp.dtype], Array]  # the dtype is what the sums are needed in


class ExpertWeights(NamedTuple):
    """The weights of gated MLPs.

    Attributes:
      factors: of the matrices into the MLPs and out of them.
      axes: of each array of these.
    """

    factors: tuple[Factors, Factors]
    axes: tuple[Factors, Factors]


class Experts(nn.Module):
    """The weights of gated MLPs: :func:`run_experts` uses them."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> ExpertWeights:
        """Gate and up [E, D, 2, F] and down [E, F, D] in the compute dtype, as they are kept on a mesh."""
        c = self.config
        E, D, F = c.moe.num_experts, c.hidden_size, c.expert_size
        dtype = jnp.dtype(c.compute_dtype)
        gate_up, gate_up_axes = factors(
            self,
            "gate_up",
            "ESD,EDGF->ESGF",
            dtype,
            matrix_init(c, "mlp_in", D, F),
            batch=("experts", "gate"),
            experts=E,
            embed=D,
            gate=2,
            mlp=F,
        )
        down, down_axes = factors(
            self,
            "down",
            "ESF,EFD->ESD",
            dtype,
            matrix_init(c, "mlp_out", F, D),
            batch=("experts",),
            experts=E,
            mlp=F,
            embed=D,
        )
        return ExpertWeights((gate_up, down), (gate_up_axes, down_axes))


def run_experts(
    config: ByteConfig, x_SD: Float[Array, "S D"], weights: tuple[Factors, Factors], groups: Groups
) -> Float[Array, "S D"]:
    """Maps rows in the order of experts, each by the MLP of its expert."""
    gate_up, down = weights
    F = gate_up.matrix.shape[-1]
    both_SH = _each_by_its_expert(x_SD, gate_up, groups)
    h_SF = ACTIVATIONS[config.hidden_act](both_SH[:, :F]) * both_SH[:, F:]
    return _each_by_its_expert(h_SF, down._replace(matrix=down.matrix[:, :, None]), groups)


def _each_by_its_expert(x_SD: Float[Array, "S D"], weight: Factors, groups: Groups) -> Float[Array, "S H"]:
    """The product of rows with the matrices [D, G, F] of their experts, G matrices side by side, and adapters."""
    E, D, G, F = weight.matrix.shape
    y_SH = grouped_matmul(x_SD, weight.matrix.reshape(E, D, G * F), groups)
    if weight.a is not None:
        R = weight.a.shape[-1]
        a_EDK = weight.a.reshape(E, G, D, R).swapaxes(1, 2).reshape(E, D, G * R)
        b_EGRF = weight.b.reshape(E, G, R, F)
        h_SK = grouped_matmul(x_SD, a_EDK, groups)
        added = [grouped_matmul(h_SK[:, g * R : (g + 1) * R], b_EGRF[:, g], groups) for g in range(G)]
        y_SH = y_SH + jnp.concatenate(added, axis=-1)
    return y_SH if weight.share is None else scale_by_group(y_SH, weight.share.reshape(E, G * F), groups)


def by_experts(
    config: ByteConfig,
    inputs: _Inputs,
    experts_NK: Int[Array, "N K"],
    devices: int,
    *,
    required: bool,
) -> Float[Array, "N D"]:
    """The weighted sums of what experts make of the tokens that chose them, in the dtype of the tokens.

    Args:
      config: of the network.
      inputs: tokens, the experts' weights, and those of the choices.
      experts_NK: the choices; the number of experts here for none.
      devices: that share the experts.
      required: an implementation that the config names must do it; else it does what it can.

    Raises:
      NotImplementedError: it refuses.
    """
    ways = {_KERNELS: _by_kernels, "xla": _in_blocks}  # the faster one first: docs/performance.md
    named = config.moe.implementation
    try:
        made = dispatch("dropless experts", named, ways, config, inputs, experts_NK, devices, required=required)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"{refusal}: set model.moe.implementation=auto") from None
    return cast(jax.Array, made).astype(inputs[0].dtype)


def _in_blocks(config: ByteConfig, inputs: _Inputs, experts_NK: Array, devices: int) -> Array:
    E = config.moe.num_experts
    rows = block_rows(experts_NK.shape[0], config.moe.num_experts_per_tok, E)
    return _in_shares(config, _through_blocks, inputs, lay_out(experts_NK, E // devices, rows), devices)


def _through_blocks(config: ByteConfig, inputs: _Inputs, layout: Layout, dtype: jnp.dtype) -> Array:
    del dtype  # XLA casts in passing
    x_ND, weights, weights_NK = inputs
    assert isinstance(layout.groups, Groups)
    return from_experts(run_experts(config, to_experts(x_ND, layout), weights, layout.groups), layout, weights_NK)


def _by_kernels(config: ByteConfig, inputs: _Inputs, experts_NK: Array, devices: int) -> Array:
    if any(each.a is not None or each.share is not None for each in inputs[1]):
        raise NotImplementedError("adapters of experts are products that the kernels do not compute")
    layout = lay_out_unaligned(experts_NK, config.moe.num_experts // devices)
    for matrix in _matrices(inputs[1]):
        rows = jax.ShapeDtypeStruct((layout.pairs_S.size, matrix.shape[1]), inputs[0].dtype)
        if (reason := kernels_refusal(rows, matrix)) is not None:
            raise NotImplementedError(reason)
    return _in_shares(config, _through_kernels, inputs, layout, devices)


def _through_kernels(config: ByteConfig, inputs: _Inputs, layout: Layout, dtype: jnp.dtype) -> Array:
    x_ND, weights, weights_NK = inputs
    given = config.hidden_act, x_ND, *_matrices(weights), weights_NK, layout
    return expert_mlp(*given, dtype=dtype, implementation=_KERNELS)


def _matrices(weights: tuple[Factors, Factors]) -> tuple[Array, Array]:
    """Into the MLPs [E, D, 2 F] and out of them [E, F, D]."""
    gate_up, down = weights
    E, D, G, F = gate_up.matrix.shape
    return gate_up.matrix.reshape(E, D, G * F), down.matrix


def _in_shares(config: ByteConfig, compute: _ByExperts, inputs: _Inputs, layout: Layout, devices: int) -> Array:
    rows = rows_of_share(layout, devices)
    if rows is None:
        return compute(config, inputs, layout, inputs[0].dtype)
    return sum_of_parts(partial(_share, config, compute, rows), parts_of(layout, rows), inputs, layout)


def _share(
    config: ByteConfig, compute: _ByExperts, rows: int, number: Array | int, inputs: _Inputs, layout: Layout
) -> Array:
    return compute(config, inputs, part_of(layout, number, rows), jnp.dtype(jnp.float32))  # they are added

"""Gated MLPs of experts for the tokens that chose them, from tokens to weighted sums, with a backward pass of its own.

N tokens, E experts, K choices a token, S rows in the order of experts, D model, F inside an expert.

The backward pass keeps of all rows what the experts' first product gives and nothing else. The slope of a choice's
weight needs no output of an expert: with ``y = h W`` it is ``d . y = (d W^T) . h``, and ``d W^T`` is there for ``h``
(Guo et al. 2025, https://arxiv.org/abs/2512.14080).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.dispatch import dispatch
from stellarbyte_jax.ops.expert_layout import Layout, sum_of_choices, to_experts, tokens_of_rows, weights_of_rows
from stellarbyte_jax.ops.grouped_matmul import grouped_matmul, grouped_matmul_dw, grouped_matmul_dx

Activation = Callable[[jax.Array], jax.Array]


def expert_mlp(
    activation: Activation,
    x_ND: Float[Array, "N D"],
    gate_up_EDH: Float[Array, "E D H"],
    down_EFD: Float[Array, "E F D"],
    weights_NK: Float[Array, "N K"],
    layout: Layout,
    *,
    implementation: str = "auto",
) -> Float[Array, "N D"]:
    """``sum_k weight_k (activation(x G) * (x U)) W`` with the matrices of each choice's expert; float32.

    Args:
      activation: of the gates, by element.
      x_ND: tokens.
      gate_up_EDH: the matrices G and U side by side, H = 2 F.
      down_EFD: the matrices W.
      weights_NK: float32, of the choices.
      layout: where the choices have their rows.
      implementation: of the products, see :func:`stellarbyte_jax.ops.grouped_matmul.grouped_matmul`.

    Raises:
      NotImplementedError: the implementation does not support the arrays or the device.
    """
    return cast(jax.Array, _mlp(activation, implementation, x_ND, gate_up_EDH, down_EFD, weights_NK, layout))


def _gated(activation: Activation, both_SH: Array) -> Array:
    F = both_SH.shape[1] // 2
    return activation(both_SH[:, :F]) * both_SH[:, F:]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(
    activation: Activation,
    implementation: str,
    x_ND: Array,
    gate_up_EDH: Array,
    down_EFD: Array,
    weights_NK: Array,
    layout: Layout,
) -> Array:
    return _forward(activation, implementation, x_ND, gate_up_EDH, down_EFD, weights_NK, layout)[0]


def _forward(
    activation: Activation,
    implementation: str,
    x_ND: Array,
    gate_up_EDH: Array,
    down_EFD: Array,
    weights_NK: Array,
    layout: Layout,
) -> tuple[Array, Any]:
    product = partial(grouped_matmul, groups=layout.groups, implementation=implementation)
    both_SH = product(_to_rows(implementation, x_ND, layout), gate_up_EDH)
    y_SD = product(_gated(activation, both_SH), down_EFD)
    sums_ND = _from_rows(implementation, y_SD, layout, weights_NK, jnp.float32)
    return sums_ND, (x_ND, gate_up_EDH, down_EFD, weights_NK, layout, both_SH)


def _backward(
    activation: Activation, implementation: str, kept: Any, d_ND: Array
) -> tuple[Array, Array, Array, Array, None]:
    x_ND, gate_up_EDH, down_EFD, weights_NK, layout, both_SH = kept
    of_rows = partial(grouped_matmul_dx, groups=layout.groups, implementation=implementation)
    of_matrices = partial(grouped_matmul_dw, groups=layout.groups, implementation=implementation)
    to_rows = partial(_to_rows, implementation, layout=layout)
    d_SD = to_rows(d_ND.astype(x_ND.dtype))
    dh_SF = of_rows(d_SD, down_EFD).astype(jnp.float32)  # of a choice whose weight is 1
    made_SF, pull = jax.vjp(partial(_gated, activation), both_SH)
    h_SF = made_SF.astype(jnp.float32)
    slopes_S = jnp.sum(dh_SF * h_SF, axis=1)
    dweights_NK = slopes_S.at[layout.rows_NK].get(mode="fill", fill_value=0).astype(weights_NK.dtype)
    weights_S1 = weights_of_rows(layout, weights_NK)[:, None]
    (dboth_SH,) = pull((dh_SF * weights_S1).astype(made_SF.dtype))
    ddown_EFD = of_matrices((h_SF * weights_S1).astype(made_SF.dtype), d_SD)
    dgate_up_EDH = of_matrices(to_rows(x_ND), dboth_SH)
    dx_ND = _from_rows(implementation, of_rows(dboth_SH, gate_up_EDH), layout, None, x_ND.dtype)
    return dx_ND, dgate_up_EDH.astype(gate_up_EDH.dtype), ddown_EFD.astype(down_EFD.dtype), dweights_NK, None


_mlp.defvjp(_forward, _backward)


def _to_rows(implementation: str, x_ND: Array, layout: Layout) -> Array:
    ways = {"xla": to_experts, "pallas": _gathered}
    return cast(jax.Array, dispatch("rows of experts", implementation, ways, x_ND, layout, required=False))


def _from_rows(implementation: str, y_SD: Array, layout: Layout, weights_NK: Array | None, dtype: Any) -> Array:
    ways = {"xla": _summed_by_xla, "pallas": _summed}
    found = dispatch("sums of experts", implementation, ways, y_SD, layout.rows_NK, weights_NK, dtype, required=False)
    return cast(jax.Array, found)


def _summed_by_xla(y_SD: Array, rows_NK: Array, weights_NK: Array | None, dtype: Any) -> Array:
    return sum_of_choices(y_SD, rows_NK, weights_NK).astype(dtype)


def _gathered(x_ND: Array, layout: Layout) -> Array:
    # Not at the top, as in ops/grouped_matmul.py.
    from stellarbyte_jax.ops.pallas.row_moves import gather_rows

    return gather_rows(x_ND, tokens_of_rows(layout))


def _summed(y_SD: Array, rows_NK: Array, weights_NK: Array | None, dtype: Any) -> Array:
    from stellarbyte_jax.ops.pallas.row_moves import sum_rows

    return sum_rows(y_SD, rows_NK, weights_NK, dtype)

"""Gated MLPs of experts for the tokens that chose them, from tokens to weighted sums, with a backward pass of its own.

N tokens, E experts, K choices a token, S rows in the order of experts, D model, F inside an expert.

The backward pass keeps of all rows what the experts' first product gives and nothing else. The slope of a choice's
weight needs no output of an expert: with ``y = h W`` it is ``d . y = (d W^T) . h``, and ``d W^T`` is there for ``h``
(Guo et al. 2025, https://arxiv.org/abs/2512.14080).
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.ops.activations import ACTIVATIONS
from stellarbyte_jax.ops.dispatch import dispatch
from stellarbyte_jax.ops.expert_layout import Layout, sum_of_choices, to_experts, weights_of_rows
from stellarbyte_jax.ops.grouped_matmul import Groups, Unaligned, grouped_matmul, grouped_matmul_dw, grouped_matmul_dx

_How = tuple[str, str, Any]  # activation, implementation, dtype of the sums


def expert_mlp(
    activation: str,
    x_ND: Float[Array, "N D"],
    gate_up_EDH: Float[Array, "E D H"],
    down_EFD: Float[Array, "E F D"],
    weights_NK: Float[Array, "N K"],
    layout: Layout,
    *,
    dtype: Any = jnp.float32,
    implementation: str = "auto",
) -> Float[Array, "N D"]:
    """``sum_k weight_k (activation(x G) * (x U)) W`` with the matrices of each choice's expert.

    Args:
      activation: of the gates, by its name in :mod:`stellarbyte_jax.ops.activations`.
      x_ND: tokens.
      gate_up_EDH: the matrices G and U side by side, H = 2 F.
      down_EFD: the matrices W.
      weights_NK: float32, of the choices.
      layout: where the choices have their rows.
      dtype: of the sums, which are taken in float32.
      implementation: of the products, see :func:`stellarbyte_jax.ops.grouped_matmul.grouped_matmul`.

    Raises:
      NotImplementedError: the implementation does not support the arrays or the device.
    """
    return cast(jax.Array, _mlp((activation, implementation, dtype), x_ND, gate_up_EDH, down_EFD, weights_NK, layout))


def _gated(activation: str, both_SH: Array) -> Array:
    F = both_SH.shape[1] // 2
    return ACTIVATIONS[activation](both_SH[:, :F]) * both_SH[:, F:]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(
    how: _How,
    x_ND: Array,
    gate_up_EDH: Array,
    down_EFD: Array,
    weights_NK: Array,
    layout: Layout,
) -> Array:
    activation, implementation, dtype = how
    x_SD = _to_rows(implementation, x_ND, layout)
    ways = {"xla": partial(_gated_product, implementation), "pallas": _gated_product_by_kernel}
    told = activation, x_SD, gate_up_EDH, layout.groups
    h_SF = cast(Array, dispatch("gated products", implementation, ways, *told, required=False))
    y_SD = grouped_matmul(h_SF, down_EFD, layout.groups, implementation=implementation)
    return _from_rows(implementation, y_SD, layout, weights_NK, dtype)


def _forward(
    how: _How,
    x_ND: Array,
    gate_up_EDH: Array,
    down_EFD: Array,
    weights_NK: Array,
    layout: Layout,
) -> tuple[Array, Any]:
    activation, implementation, dtype = how
    x_SD = _to_rows(implementation, x_ND, layout)
    ways = {"xla": partial(_both_products, implementation), "pallas": _woven_products}
    told = activation, x_SD, gate_up_EDH, layout.groups
    found = dispatch("gated products with a backward pass", implementation, ways, *told, required=False)
    h_SF, both_SH, gate_up_EDH = cast(tuple[Array, Array, Array], found)
    y_SD = grouped_matmul(h_SF, down_EFD, layout.groups, implementation=implementation)
    sums_ND = _from_rows(implementation, y_SD, layout, weights_NK, dtype)
    return sums_ND, (x_ND, gate_up_EDH, down_EFD, weights_NK, layout, both_SH)


def _both_products(
    implementation: str, activation: str, x_SD: Array, gate_up_EDH: Array, groups: Groups | Unaligned
) -> tuple[Array, Array, Array]:
    """Gated rows, what they are made of, and the matrices, with columns in the order that the backward pass gets."""
    both_SH = grouped_matmul(x_SD, gate_up_EDH, groups, implementation=implementation)
    return _gated(activation, both_SH), both_SH, gate_up_EDH


def _woven_products(
    activation: str, x_SD: Array, gate_up_EDH: Array, groups: Groups | Unaligned
) -> tuple[Array, Array, Array]:
    """As :func:`_both_products`, with columns of gates and of what they multiply woven together."""
    from stellarbyte_jax.ops.pallas.gated_products import gated_products, woven

    if isinstance(groups, Groups):
        raise NotImplementedError("rows of blocks have a kernel only without a backward pass")
    matrices_EDH = woven(gate_up_EDH) if gate_up_EDH.shape[2] % 128 == 0 else gate_up_EDH
    return *gated_products(activation, x_SD, matrices_EDH, groups.sizes_E), matrices_EDH


def _is_woven(implementation: str, x_SD: jax.ShapeDtypeStruct, gate_up_EDH: Array, layout: Layout) -> bool:
    """Whether the columns are those of :func:`_woven_products`."""
    if implementation != "pallas" or isinstance(layout.groups, Groups):
        return False
    from stellarbyte_jax.ops.pallas.gated_products import refusal

    return refusal(x_SD, gate_up_EDH) is None


def _gated_product(
    implementation: str, activation: str, x_SD: Array, gate_up_EDH: Array, groups: Groups | Unaligned
) -> Array:
    return _gated(activation, grouped_matmul(x_SD, gate_up_EDH, groups, implementation=implementation))


def _gated_product_by_kernel(activation: str, x_SD: Array, gate_up_EDH: Array, groups: Groups | Unaligned) -> Array:
    # Not at the top, as in ops/grouped_matmul.py.
    from stellarbyte_jax.ops.pallas.gated_rows import gated_rows

    return gated_rows(activation, x_SD, gate_up_EDH, groups.sizes_E)


def _backward(how: _How, kept: Any, d_ND: Array) -> tuple[Array, Array, Array, Array, None]:
    activation, implementation, _ = how
    x_ND, gate_up_EDH, down_EFD, weights_NK, layout, both_SH = kept
    of_rows = partial(grouped_matmul_dx, groups=layout.groups, implementation=implementation)
    of_matrices = partial(grouped_matmul_dw, groups=layout.groups, implementation=implementation)
    to_rows = partial(_to_rows, implementation, layout=layout)
    d_SD = to_rows(d_ND.astype(x_ND.dtype))
    dh_SF = of_rows(d_SD, down_EFD)  # of a choice whose weight is 1
    weights_S = weights_of_rows(layout, weights_NK)
    woven = _is_woven(implementation, jax.ShapeDtypeStruct(d_SD.shape, d_SD.dtype), gate_up_EDH, layout)
    given = activation, both_SH, dh_SF, weights_S
    if woven:
        from stellarbyte_jax.ops.pallas.gated_backward import gated_backward

        dboth_SH, weighted_SF, slopes_S = gated_backward(*given, woven=True)
    else:
        dboth_SH, weighted_SF, slopes_S = _gated_backward(*given)
    dweights_NK = slopes_S.at[layout.rows_NK].get(mode="fill", fill_value=0).astype(weights_NK.dtype)
    ddown_EFD = of_matrices(weighted_SF, d_SD)
    dgate_up_EDH = of_matrices(to_rows(x_ND), dboth_SH)
    if woven:
        from stellarbyte_jax.ops.pallas.gated_products import unwoven

        dgate_up_EDH = unwoven(dgate_up_EDH)
    dx_ND = _from_rows(implementation, of_rows(dboth_SH, gate_up_EDH), layout, None, x_ND.dtype)
    return dx_ND, dgate_up_EDH.astype(gate_up_EDH.dtype), ddown_EFD.astype(down_EFD.dtype), dweights_NK, None


_mlp.defvjp(_forward, _backward)


def _to_rows(implementation: str, x_ND: Array, layout: Layout) -> Array:
    ways = {"xla": to_experts, "pallas": _spread}
    return cast(jax.Array, dispatch("rows of experts", implementation, ways, x_ND, layout, required=False))


def _from_rows(implementation: str, y_SD: Array, layout: Layout, weights_NK: Array | None, dtype: Any) -> Array:
    ways = {"xla": _summed_by_xla, "pallas": _summed}
    found = dispatch("sums of experts", implementation, ways, y_SD, layout.rows_NK, weights_NK, dtype, required=False)
    return cast(jax.Array, found)


def _gated_backward(activation: str, both_SH: Array, dh_SF: Array, weights_S: Array) -> tuple[Array, Array, Array]:
    weights_S1 = weights_S[:, None]
    made_SF, pull = jax.vjp(partial(_gated, activation), both_SH)
    h_SF, dh_SF = made_SF.astype(jnp.float32), dh_SF.astype(jnp.float32)
    (dboth_SH,) = pull((dh_SF * weights_S1).astype(made_SF.dtype))
    return dboth_SH, (h_SF * weights_S1).astype(made_SF.dtype), jnp.sum(dh_SF * h_SF, axis=1)


def _summed_by_xla(y_SD: Array, rows_NK: Array, weights_NK: Array | None, dtype: Any) -> Array:
    return sum_of_choices(y_SD, rows_NK, weights_NK).astype(dtype)


def _spread(x_ND: Array, layout: Layout) -> Array:
    if isinstance(layout.groups, Groups):
        raise NotImplementedError("empty rows of blocks must be zeros, and the kernel writes only rows of tokens")
    from stellarbyte_jax.ops.pallas.row_moves import spread_rows

    return spread_rows(x_ND, layout.rows_NK, layout.pairs_S.size)


def _summed(y_SD: Array, rows_NK: Array, weights_NK: Array | None, dtype: Any) -> Array:
    from stellarbyte_jax.ops.pallas.row_moves import sum_rows

    return sum_rows(y_SD, rows_NK, weights_NK, dtype)

"""Experts from tokens to sums, beside all experts for all tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.kernels import computed_by_xla  # noqa: F401 (a fixture)

from stellarbyte_jax.ops.expert_layout import lay_out, lay_out_slots, lay_out_unaligned
from stellarbyte_jax.ops.expert_mlp import expert_mlp
from stellarbyte_jax.ops.pallas import row_moves
from stellarbyte_jax.ops.routing import place

N, K, E, D, F = 37, 3, 5, 6, 4
LAYOUTS = {
    "anywhere": lambda experts: lay_out_unaligned(experts, E),
    "blocks": lambda experts: lay_out(experts, E, 8),
    "a block each": lambda experts: lay_out(experts, E, 40),
    "rows": lambda experts: lay_out(experts, E, 1),
    "slots": lambda experts: lay_out_slots(place(experts, jnp.ones(experts.shape), jnp.zeros(E, jnp.int32), N), N),
}


def drawn(loads):
    """Some tokens have fewer experts than others, some have none, and one expert has nobody; some weights are 0."""
    random = np.random.default_rng(0)
    experts = np.stack([random.permutation(E)[:K] for _ in range(N)])
    experts[random.random((N, K)) < 0.2] = E
    experts[experts == 3] = E
    if loads == "nobody":
        experts[:] = E
    shapes = (N, D), (E, D, 2 * F), (E, F, D), (N, K)
    inputs = [0.5 * random.standard_normal(shape) for shape in shapes]
    inputs[3][random.random((N, K)) < 0.1] = 0
    return jax.device_put(np.asarray(experts, np.int32)), inputs


def of_all(activation, x, gate_up, down, weights, experts):
    """What every expert makes of every token, and the choices among it."""
    both_NEH = jnp.einsum("nd,edh->neh", x, gate_up)
    y_NED = jnp.einsum("nef,efd->ned", activation(both_NEH[..., :F]) * both_NEH[..., F:], down)
    chosen_NKE = jax.nn.one_hot(experts, E, dtype=x.dtype)  # nothing for no expert
    return jnp.einsum("nk,nke,ned->nd", weights, chosen_NKE, y_NED)


def assert_values_and_gradients(loads, layout, implementation):
    experts, inputs = drawn(loads)
    factors = np.random.default_rng(1).standard_normal((N, D))
    laid = LAYOUTS[layout](experts)

    def ours(*inputs):
        made = expert_mlp("gelu_pytorch_tanh", *inputs, laid, implementation=implementation)
        return jnp.sum(jnp.sin(made) * factors.astype(np.float32))

    with jax.enable_x64():
        exact = [jnp.asarray(x, jnp.float64) for x in inputs]
        loss = jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(of_all(jax.nn.gelu, *x, experts)) * factors), (0, 1, 2, 3))
        value, right = jax.device_get(jax.jit(loss)(*exact))
    run = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))
    found, slopes = jax.device_get(run(*(jax.device_put(np.asarray(x, np.float32)) for x in inputs)))
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    for name, a, b in zip(("x", "gate and up", "down", "weights"), slopes, right, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b), name


@pytest.mark.parametrize("loads", ["some", "nobody"])
@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "anywhere", "blocks"))
def test_values_and_all_gradients(layout, loads):
    assert_values_and_gradients(loads, layout, "auto")


@pytest.mark.usefixtures("computed_by_xla")
@pytest.mark.parametrize("layout", mostly_slow(["blocks", "a block each", "slots"], "blocks"))
def test_what_kernels_leave_in_empty_rows_of_blocks_is_in_no_gradient(layout, monkeypatch):
    def spread_rows(x_ND, rows_NK, rows):
        unnamed = jnp.full((rows, D), jnp.nan, x_ND.dtype)
        return unnamed.at[rows_NK].set(jnp.broadcast_to(x_ND[:, None], (N, K, D)), mode="drop")

    monkeypatch.setattr(row_moves, "spread_rows", spread_rows)
    assert_values_and_gradients("some", layout, "pallas")


def test_the_backward_pass_keeps_one_array_of_all_rows():
    experts, inputs = drawn("some")
    laid = jax.jit(lay_out_unaligned, static_argnums=1)(experts, E)
    inputs = [*(np.asarray(x, jnp.bfloat16) for x in inputs[:3]), np.float32(inputs[3])]
    _, back = jax.jit(lambda *x: jax.vjp(lambda *x: expert_mlp("silu", *x, laid), *x))(*inputs)
    rows = laid.pairs_S.size
    kept = [x for x in jax.tree.leaves(back) if rows in x.shape and x.dtype == jnp.bfloat16]
    assert [x.shape for x in kept] == [(rows, 2 * F)]
    assert [slope.dtype for slope in jax.eval_shape(back, jax.ShapeDtypeStruct((N, D), jnp.float32))] == [
        jnp.bfloat16
    ] * 3 + [jnp.float32]

"""The layer with experts where room is short: gradients, the order of rows, and the size of its largest array."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense_experts
from helpers.grids import REPEATS
from helpers.moe_layer import CAPACITY, D, E, config_of, context, layer, tokens, weights_of
from jax.extend.core import jaxprs_in_params

from stellarbyte_jax.model.io import LayerState
from stellarbyte_jax.model.moe import MoE, dispatch_choices
from stellarbyte_jax.model.router import Router

ROOM = {**CAPACITY, "capacity_factor": 0.7}
ORDERLY = ("next_best", "cold", "sticky")


@partial(jax.jit, static_argnums=0)
def taken(config, weights, x, ctx):
    """The expert that takes each choice [N, K]; E where none does."""
    decision = Router(config).apply({"params": weights["router"]}, x, ctx, None)
    return dispatch_choices(config, decision, ctx, None).experts_NK


@pytest.mark.parametrize(
    ("norm", "overflow"),
    [(False, ()), pytest.param(True, ("next_best",), marks=REPEATS), (False, ORDERLY), (True, ORDERLY)],
)
def test_gradients_are_those_of_the_experts_that_took_the_choices(norm, overflow):
    """Of tokens, experts and router, where choices are moved and lost: a loop over all experts, with their weights."""
    config = config_of(**ROOM, overflow=overflow, norm_topk_prob=norm)
    weights, (x, valid) = weights_of(config), tokens(3, 9)
    ctx, mask = context(valid), valid.reshape(-1)
    slope = np.random.default_rng(8).standard_normal((27, D)).astype(np.float32)
    experts = np.asarray(taken(config, weights, x, ctx))
    assert ((experts == E) & mask[:, None]).any() and (experts < E).any()

    def ours(weights, x):
        out = layer(config, weights, x, ctx)[0].reshape(-1, D)
        return jnp.sum(out * slope), out

    @jax.numpy_rank_promotion("allow")
    @jax.numpy_dtype_promotion("standard")
    def loop(weights, x):
        flat = x.reshape(-1, D)
        _, scores, chosen, _ = dense_experts.route(config, weights["router"], flat, jax.device_put(mask))
        factor = 1 / jnp.where(mask, (scores * chosen).sum(1), 1) if norm else jnp.ones(27)
        out = jnp.zeros((27, D))
        for e in range(E):
            made = dense_experts.gated(flat, *(weights["experts"][name][e] for name in ("gate_up", "down")))
            out += (np.any(experts == e, axis=1) * scores[:, e] * factor)[:, None] * made
        return jnp.sum(out * slope), out

    (_, found), slopes = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(weights, x)
    (_, expected), expected_slopes = jax.jit(jax.value_and_grad(loop, (0, 1), has_aux=True))(weights, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(slopes), jax.tree.leaves(expected_slopes), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4, err_msg=str(path))
        assert np.any(a) or "tracked" in jax.tree_util.keystr(path), path


@pytest.mark.parametrize("overflow", [(), ORDERLY])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_does_not_matter_where_weights_differ(seed, overflow):
    """Slots go by weights, not by places in the batch, also where room is short."""
    config = config_of(**ROOM, overflow=overflow)
    weights, (x, valid) = weights_of(config), tokens(4, 10, seed)
    order = np.random.default_rng(seed).permutation(4)
    ctx, moved_ctx = context(valid), context(valid[order])
    before = np.asarray(taken(config, weights, x, ctx)).reshape(4, 10, 2)
    after = np.asarray(taken(config, weights, x[order], moved_ctx)).reshape(4, 10, 2)
    np.testing.assert_array_equal(after, before[order])
    found = layer(config, weights, x, ctx)[0]
    np.testing.assert_allclose(layer(config, weights, x[order], moved_ctx)[0], found[order], atol=1e-6)


def sizes(jaxpr):
    """Shapes of all arrays that a program makes, inner ones too."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_no_array_has_tokens_times_experts_times_anything_large(dispatch):
    """Forward and backward: tokens times experts times choices at most, beside rows, weights and their gradients."""
    N, experts, K, F = 2048, 32, 2, 4
    room = {"dispatch": "capacity", "dynamic_capacity": True, "overflow": (*ORDERLY, "random")}
    settings = {"num_experts": experts, **(room if dispatch == "capacity" else {})}
    config = config_of(**settings)
    slots = config.moe.slots(N)
    rows = max(experts * slots, N * K + experts * 128)
    ctx = context(np.ones((2, N // 2), bool))
    weights = weights_of(config)

    def total(weights, x):
        rngs = {"dropout": jax.random.key(0)}
        out, _, aux = MoE(config).apply({"params": weights}, x, ctx, LayerState(), rngs=rngs)
        return jnp.sum(out**2) + sum(aux.values().values())

    x = jax.ShapeDtypeStruct((2, N // 2, D), jnp.float32)
    found = list(sizes(jax.make_jaxpr(jax.grad(total, (0, 1)))(weights, x).jaxpr))
    largest = max(found, key=np.prod)
    assert np.prod(largest) <= max(N * experts * K, rows * 2 * max(D, F)), largest
    assert (experts * slots, D) in found if dispatch == "capacity" else True
    assert np.prod(largest) < N * experts * slots / 50

"""Experts by the kernels on a Hopper GPU: their numbers, a training step of a network, and experts over two GPUs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)
from jax.sharding import NamedSharding, PartitionSpec

from stellarbyte_jax.config import ByteConfig, MoEConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward, init_params
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.lora import Factors
from stellarbyte_jax.model.moe import dropless
from stellarbyte_jax.ops.expert_layout import lay_out_unaligned
from stellarbyte_jax.ops.expert_mlp import expert_mlp
from stellarbyte_jax.ops.routing import Choices
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.experts import on_devices

pytestmark = pytest.mark.gpu

N, K, E, D, F = 1003, 3, 8, 256, 192
CONFIG = ByteConfig(
    vocab_size=512,
    hidden_size=D,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=512,
    compute_dtype="bfloat16",
    moe=MoEConfig(num_experts=E, num_experts_per_tok=K, intermediate_size=F),
)


def by(implementation, **changes):
    return dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, implementation=implementation), **changes)


def choices(loads):
    random = np.random.default_rng(0)
    experts = np.stack([random.permutation(E)[:K] for _ in range(N)])
    if loads == "one has nearly all":
        experts[:, 0] = 2
        experts[:, 1:] = np.where(random.random((N, K - 1)) < 0.9, E, experts[:, 1:])
        experts[:, 1:][experts[:, 1:] == 2] = E
    if loads == "few":
        experts[random.random((N, K)) < 0.99] = E
    return jax.device_put(np.asarray(experts, np.int32))


def error(found, exact):
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    assert np.isfinite(found).all()
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("loads", ["even", "one has nearly all", "few"])
def test_values_and_gradients_are_close_to_float32(loads):
    experts = choices(loads)
    random = np.random.default_rng(1)
    shapes = (N, D), (E, D, 2 * F), (E, F, D)
    inputs = [
        jax.device_put(np.asarray(random.standard_normal(shape) * shape[-2] ** -0.5, jnp.bfloat16)) for shape in shapes
    ]
    inputs[0] = inputs[0] * jnp.asarray(N**0.5, jnp.bfloat16)
    weights, d = (jax.device_put(np.asarray(random.standard_normal((N, size)), np.float32)) for size in (K, D))

    def values(way, *inputs):
        y, pull = jax.vjp(way, *inputs, weights)
        return y, *pull(d)

    def of_all(x, gate_up, down, weights):
        both = jnp.einsum("nd,edh->neh", x, gate_up)
        y = jnp.einsum("nef,efd->ned", jax.nn.silu(both[..., :F]) * both[..., F:], down)
        return jnp.einsum("nk,nke,ned->nd", weights, jax.nn.one_hot(experts, E, dtype=jnp.float32), y)

    def kernels(*inputs):
        return expert_mlp("silu", *inputs, lay_out_unaligned(experts, E), implementation="pallas")

    with jax.default_matmul_precision("highest"):
        right = jax.jit(partial(values, of_all))(*(x.astype(jnp.float32) for x in inputs))
    found = jax.jit(partial(values, kernels))(*inputs)
    for name, a, b in zip(("output", "x", "gate and up", "down", "weights"), found, right, strict=True):
        assert error(a, b) < 1e-2, name


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_networks_gradients_are_close_to_those_of_blocks(remat):
    tokens = jax.device_put(np.asarray(np.random.default_rng(0).integers(0, 512, (4, 256)), np.int32))
    params = init_params(ByteTransformer(CONFIG), jax.random.key(0))

    def gradients(config):
        model = ByteTransformer(config)

        def loss(params):
            hidden = forward(model, params, Inputs(tokens), train=True).hidden_BTD
            return jnp.mean(jnp.sin(hidden.astype(jnp.float32)))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        for kernel in ("grouped_matmul_dw", "spread_rows", "sum_rows", "gated_products", "gated_backward"):
            assert (kernel in compiled.as_text()) == (config.moe.implementation == "pallas")
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(compiled(params))])

    exact = gradients(by("xla", compute_dtype="float32"))
    kernels, blocks = (error(gradients(by(way, remat=remat)), exact) for way in ("pallas", "xla"))
    assert kernels < 1.3 * blocks + 1e-3, (kernels, blocks)


@pytest.mark.parametrize("loads", ["even", "one has nearly all"])
def test_two_gpus_that_share_experts_give_what_one_gives(loads):
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs, JAX finds one")
    B, T = 4, 500
    experts = jnp.tile(choices(loads)[:T], (B, 1)).reshape(B, T, K)
    random = np.random.default_rng(1)
    shapes = (B, T, D), (E, D, 2, F), (E, F, D)
    x, *matrices = [jax.device_put(np.asarray(random.standard_normal(s) * 0.06, jnp.bfloat16)) for s in shapes]
    of_choices = jax.device_put(np.asarray(random.random((B, T, K)), np.float32))
    axes = (Factors(("experts", "embed", "gate", "mlp")), Factors(("experts", "mlp", "embed")))

    def loss(x, of_choices, weights):
        tokens = Choices(experts, of_choices, jnp.ones((B, T)))
        made = on_devices(partial(dropless, by("pallas")), x, tokens, None, weights, axes)
        return jnp.sum(jnp.square(made.y_BTD.astype(jnp.float32)))

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    inputs = x, of_choices, tuple(Factors(w) for w in matrices)
    alone = jax.device_get(run(*inputs))
    with jax.set_mesh(make_mesh({"expert": 2})):
        cut = NamedSharding(jax.sharding.get_mesh(), PartitionSpec("expert"))
        shared = jax.device_get(run(*jax.device_put(inputs, cut)))
    jax.tree.map(lambda a, b: None if error(a, b) < 1e-2 else pytest.fail(str(a.shape)), shared, alone)

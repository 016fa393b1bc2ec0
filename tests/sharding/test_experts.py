"""Experts on devices that share them, for loads of which the layers of a model see none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernels import computed_by_xla  # noqa: F401 (a fixture)
from helpers.training import settings
from jax.sharding import NamedSharding, PartitionSpec

from stellarbyte_jax.config import ByteConfig, MeshConfig, MoEConfig
from stellarbyte_jax.model.lora import Factors
from stellarbyte_jax.model.moe import dropless
from stellarbyte_jax.ops.expert_layout import block_rows, lay_out, parts_of, rows_of_share
from stellarbyte_jax.ops.routing import Choices
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.experts import Made, on_devices
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.placement import mesh_of, on_mesh

B, T, D, F, E, K = 64, 16, 8, 4, 8, 2
CONFIG = ByteConfig(
    vocab_size=64,
    hidden_size=D,
    num_attention_heads=2,
    intermediate_size=F,
    compute_dtype="float32",
    moe=MoEConfig(num_experts=E, num_experts_per_tok=K, intermediate_size=F),
)
AXES = (Factors(("experts", "embed", "gate", "mlp")), Factors(("experts", "mlp", "embed")))


@jax.jit
def value_and_gradients(x, of_choices, weights, experts):
    def loss(x, of_choices, weights):
        tokens = Choices(experts, of_choices, jnp.ones((B, T)))
        made = on_devices(functools.partial(dropless, CONFIG), x, tokens, None, weights, AXES)
        return jnp.sum(jnp.sin(made.y_BTD))

    return jax.value_and_grad(loss, (0, 1, 2))(x, of_choices, weights)


@functools.partial(jax.jit, static_argnums=0)
def by_kernels(sizes, x, of_choices, weights, experts):
    """The same by the path of the kernels, which XLA computes here; ``sizes`` of the mesh, so that each is traced."""
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, implementation="pallas"))

    def loss(x, of_choices, weights):
        tokens = Choices(experts, of_choices, jnp.ones((B, T)))
        made = on_devices(functools.partial(dropless, config), x, tokens, None, weights, AXES)
        return jnp.sum(jnp.sin(made.y_BTD))

    return jax.value_and_grad(loss, (0, 1, 2))(x, of_choices, weights)


@pytest.mark.parametrize("loads", ["one expert", "one device", "even", "nothing"])
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.usefixtures("computed_by_xla")
def test_however_uneven_the_loads_are_devices_give_what_one_gives(loads, devices, monkeypatch):
    """Values and all gradients; where one device has most of the pairs, it computes several shares."""
    monkeypatch.setattr(placement, "devices", lambda: jax.devices()[:devices])
    random = np.random.default_rng(1)
    N = B * T
    experts = {
        "one expert": np.stack([np.full(N, 5), np.full(N, E)], axis=1),
        "one device": np.tile([5, 4], (N, 1)),
        "even": np.stack([np.arange(N) % E, (np.arange(N) + 1) % E], axis=1),
        "nothing": np.full((N, K), E),
    }[loads].astype(np.int32)
    here = E // devices
    layout = lay_out(jnp.where(experts // here == 5 // here, experts % here, here), here, block_rows(N, K, E))
    parts = parts_of(layout, rows_of_share(layout, devices))
    assert parts == {("one device", 2): 2, ("one expert", 8): 2, ("one device", 8): 2}.get((loads, devices), 1)
    shapes = ((E, D, 2, F), (E, F, D))
    weights = tuple(Factors(jnp.asarray(0.4 * random.standard_normal(s), jnp.float32)) for s in shapes)
    x = jax.device_put(np.asarray(random.standard_normal((B, T, D)), np.float32))
    of_choices = jax.device_put(np.asarray(random.random((B, T, K)), np.float32))

    experts = experts.reshape(B, T, K)
    expected = value_and_gradients(x, of_choices, weights, experts)
    config = settings(model=CONFIG, global_batch_size=B, mesh=MeshConfig(data=1, expert=devices))
    with on_mesh(mesh_of(config)):
        rows = NamedSharding(jax.sharding.get_mesh(), PartitionSpec("expert"))
        inputs = jax.device_put((x, of_choices, weights, experts), rows)
        found = value_and_gradients(*inputs), by_kernels(devices, *inputs)
    for each in found:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), each, expected)


def test_tokens_that_all_devices_have_are_not_exchanged():
    """As of rows that devices do not divide, in generation: each has them all, and would compute every copy."""
    seen = []

    def local(x_BTD, tokens, shared, weights, exchange, differ):
        seen.append((x_BTD.shape[0], exchange.devices, exchange.differ, differ))
        return Made(x_BTD, tokens, jnp.zeros(()))

    weights = tuple(Factors(jnp.ones(shape)) for shape in ((E, D, 2, F), (E, F, D)))
    with jax.set_mesh(make_mesh({"expert": 2})):
        for rows in (4, 3):
            jax.eval_shape(lambda x: on_devices(local, x, None, None, weights, AXES), jnp.ones((rows, 1, D)))
    assert seen == [(2, 2, True, ("expert",)), (3, 2, False, ())]

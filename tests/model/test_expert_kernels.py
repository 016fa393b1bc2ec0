"""Experts whose products kernels compute: the same network. Without a GPU; see test_expert_kernels_gpu.py."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.kernels import computed_by_xla  # noqa: F401 (a fixture)
from helpers.variants import VARIANTS, call, make, some_tokens

from stellarbyte_jax.config import ByteConfig, ConfigError, LoRAConfig, MoEConfig
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.ops import dispatch
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.sharding import make_mesh

WITH_EXPERTS = [
    name for name, each in VARIANTS.items() if "moe" in each and each["moe"].get("dispatch", "dropless") == "dropless"
]


def by_kernels(model, **changes):
    config = model.config
    moe = dataclasses.replace(config.moe, implementation="pallas")
    return ByteTransformer(dataclasses.replace(config, moe=moe, **changes))


def loss_of(model, tokens, train=False):
    def loss(params):
        logits = call(model, params, Inputs(tokens), dropout_key=jax.random.key(0) if train else None)[0]
        return jnp.mean(jnp.sin(logits))

    return loss


@pytest.mark.usefixtures("computed_by_xla")
@pytest.mark.parametrize("remat", mostly_slow(["none", "full"], "none"))
@pytest.mark.parametrize("name", mostly_slow(WITH_EXPERTS, "experts"))
def test_loss_and_gradients_are_those_of_blocks(name, remat):
    model, params = make(name, remat=remat)
    tokens = some_tokens(3, 29)  # so that choices are no multiple of eight
    # As in training, where what is refused does not go another way.
    found, right = (jax.jit(jax.value_and_grad(loss_of(m, tokens, True)))(params) for m in (by_kernels(model), model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, right)


@pytest.mark.usefixtures("computed_by_xla")
def test_kernels_are_taken_where_no_implementation_is_named(caplog, monkeypatch):
    model, params = make("experts")
    monkeypatch.setattr(dispatch, "_logged", set())
    assert model.config.moe.implementation == "auto"
    with caplog.at_level(logging.INFO):
        jax.eval_shape(loss_of(model, some_tokens(2, 16)), params)
    assert "dropless experts: using pallas" in caplog.text


def test_both_matrices_of_experts_must_be_what_kernels_take(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)
    moe = {"num_experts": 4, "intermediate_size": 32, "implementation": "pallas"}  # 64 columns in, 32 rows out
    model, params = make("experts", hidden_size=64, compute_dtype="bfloat16", moe=moe)
    refused = "^dropless experts: pallas refused: inputs and outputs must be multiples of 64, not 32 and 64: set"
    with pytest.raises(NotImplementedError, match=refused):
        jax.eval_shape(loss_of(model, some_tokens(2, 16), train=True), params)


def test_without_such_a_gpu_training_is_refused_and_the_rest_goes_another_way(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    model, params = make("experts")
    named, tokens = by_kernels(model), some_tokens(2, 16)
    both = "both factors must be bfloat16 or both float16, not float32 and float32"
    refused = f"^dropless experts: pallas refused: {both}: set model.moe.implementation=auto"
    with pytest.raises(NotImplementedError, match=refused):
        loss_of(named, tokens, train=True)(params)
    with caplog.at_level(logging.INFO):
        found = call(named, params, Inputs(tokens))[0]
    np.testing.assert_array_equal(found, call(model, params, Inputs(tokens))[0])
    assert "dropless experts: using xla (pallas refused: both factors" in caplog.text
    assert "rows of experts" not in caplog.text, "what is refused is told once"


@pytest.mark.usefixtures("computed_by_xla")
def test_adapters_of_experts_are_refused():
    model, _ = make("experts", lora=LoRAConfig(r=2, target_modules=("experts",)))
    named = by_kernels(model)
    _, params = make("experts", lora=model.config.lora)
    with pytest.raises(NotImplementedError, match="pallas refused: adapters of experts"):
        loss_of(named, some_tokens(2, 16), train=True)(params)


def test_a_capacity_is_computed_one_way():
    with pytest.raises(ConfigError, match=r"moe.implementation=pallas is of moe.dispatch=dropless"):
        MoEConfig(num_experts=4, implementation="pallas", dispatch="capacity")


def test_the_kernels_are_in_the_program_of_experts_over_two_devices(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)
    moe = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=128)
    sizes = dict(vocab_size=512, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512)
    model = ByteTransformer(ByteConfig(**sizes, compute_dtype="bfloat16", moe=moe))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    with jax.set_mesh(make_mesh({"expert": 2})), jax.numpy_dtype_promotion("standard"):  # jax mixes dtypes inside
        run = jax.jit(jax.grad(loss_of(model, some_tokens(4, 64), train=True)))
        text = run.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in (
        "gated_products",
        "gated_backward",
        "grouped_matmul",
        "grouped_matmul_dx",
        "grouped_matmul_dw",
        "spread_rows",
        "sum_rows",
    ):
        assert f"{kernel}_mosaic_gpu" in text, kernel

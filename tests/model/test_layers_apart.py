"""Weights of layers as arrays of their own: the same numbers, and no loop over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.variants import VARIANTS, make, run, run_on

from stellarbyte_jax import generate
from stellarbyte_jax.inference import programs
from stellarbyte_jax.inference.bank import AdapterBank
from stellarbyte_jax.model import params as weights
from stellarbyte_jax.model.decoder import forward_step, param_shapes
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.layers import layers_are_apart, with_layers_apart
from stellarbyte_jax.model.state.cache import make_cache

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 11), dtype=np.int32)
ALWAYS = (
    "mixed windows, qk norm, bias",
    "experts in every second layer, by context, priority and temperature",
    "a pool of experts, parallel, xpos",
)


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, *ALWAYS))
def test_logits_are_those_of_stacks(variant):
    """The layers of the variants are more than a period, and of some the last period is cut short."""
    model, params = make(variant)
    apart = jax.jit(with_layers_apart)(params)
    assert layers_are_apart(apart) and not layers_are_apart(params)
    if model.config.moe.num_experts == 0:
        np.testing.assert_allclose(run(model, apart, TOKENS), run(model, params, TOKENS), atol=1e-5)
    found = []
    for tree in (params, apart):
        cache = make_cache(model.config, 2, 16)
        first, state = run_on(model, tree, TOKENS[:, :6], cache=cache)
        more, _ = run_on(model, tree, TOKENS[:, 6:7], cache=state.cache, router=state.router)
        found.append(np.concatenate([first, more], axis=1))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_each_layer_has_its_own_weights_in_the_compute_dtype_and_they_are_split_once():
    model, params = make("mixed windows, qk norm, bias", compute_dtype="bfloat16")
    apart = programs.split_layers(model, params)
    assert programs.cast_for_inference(model, apart) is apart
    for stack, layers in apart["layers"].items():
        for number, layer in enumerate(layers):
            assert layer["attn"]["q"].dtype == jnp.bfloat16 and layer["attn_norm"]["scale"].dtype == jnp.float32
            for ours, whole in zip(jax.tree.leaves(layer), jax.tree.leaves(params["layers"][stack]), strict=True):
                np.testing.assert_array_equal(ours, whole[number].astype(ours.dtype))


def test_generation_with_them():
    model, params = make("windows, sinks, pruned weights, cap", compute_dtype="float32")
    asked = dict(max_new_tokens=9, log_probs=True, stream=lambda new: None)
    found = generate(model, programs.split_layers(model, params), TOKENS, **asked)
    expected = generate(model, params, TOKENS, **asked)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


@pytest.mark.parametrize("apart", [True, False])
def test_a_step_has_no_loop_over_layers(apart):
    model, _ = make("llama")
    shapes = param_shapes(model)
    shapes = jax.eval_shape(with_layers_apart, shapes) if apart else shapes
    state = jax.eval_shape(lambda: State(make_cache(model.config, 2, 16)))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = jax.jit(forward_step, static_argnums=0).lower(model, shapes, tokens, state).as_text()
    assert ("stablehlo.while" in text) == (not apart)


@pytest.mark.parametrize(("rows", "asked"), [(1, jnp.float32), (2, jnp.bfloat16)])
def test_a_product_of_one_row_is_summed_and_returned_by_xla_in_float32(rows, asked):
    """So that XLA for a GPU, which computes it as a product and a sum, rounds nothing between them."""
    x, w = jnp.ones((rows, 1, 2, 4), jnp.bfloat16), jnp.ones((2, 4, 8), jnp.bfloat16)
    names = {"N": "heads", "H": "head_dim", "D": "embed"}
    found = jax.make_jaxpr(lambda x, w: weights.product("BTNH,NHD->BTD", x, w, names))(x, w)
    assert found.out_avals[0].dtype == jnp.bfloat16
    (product,) = (eqn for eqn in found.jaxpr.eqns if eqn.primitive.name == "dot_general")
    assert product.outvars[0].aval.dtype == asked


def test_a_bank_of_adapters_refuses_them():
    model, params = make("llama")
    with pytest.raises(ValueError, match="give those of cast_for_inference, not of split_layers"):
        AdapterBank(model, programs.split_layers(model, params), slots=1, max_rank=2)

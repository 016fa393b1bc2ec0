"""A decoding step of one row reads the weights of its experts alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from helpers.grids import REPEATS
from helpers.variants import BASE, make
from jax.extend.core import jaxprs_in_params

from stellarbyte_jax.inference.api import generate
from stellarbyte_jax.model.decoder import ByteTransformer, forward_step, param_shapes
from stellarbyte_jax.model.io import State

E, K, D, F = 16, 2, 32, 40
KINDS = {
    "alike": {},
    "two kinds of windows": {
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention") * 2,
    },
    "a pool": {"moe": {"num_experts": E, "num_experts_per_tok": K, "intermediate_size": F, "shared_pool": True}},
}


def traced(kind, rows):
    moe = {"num_experts": E, "num_experts_per_tok": K, "intermediate_size": F}
    model = ByteTransformer(dataclasses.replace(BASE, hidden_size=D, **{"moe": moe, **KINDS[kind]}))
    state = jax.eval_shape(lambda: State.empty(model.config, rows, 16))
    step = jax.jit(functools.partial(forward_step, model), donate_argnums=2)
    return step.trace(param_shapes(model), jax.ShapeDtypeStruct((rows,), jnp.int32), state)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_one_row_touches_the_experts_of_its_token(kind):
    found = traced(kind, 1)
    matrices = {(D, 2 * F), (F, D)}
    products, gathered = set(), set()
    for eqn in equations(found.jaxpr.jaxpr):
        if eqn.primitive.name == "dot_general":
            products |= {x.aval.shape for x in eqn.invars if x.aval.shape[1:] in matrices}
        elif eqn.primitive.name == "gather":
            gathered |= {x.aval.shape for x in eqn.outvars if x.aval.shape[1:] in matrices}
    assert products == gathered == {(K, *shape) for shape in matrices}
    # Nor does the program hold them elsewhere: what it needs besides its arguments is smaller than one layer's experts.
    of_layer = 4 * E * 3 * D * F
    assert found.lower().compile().memory_analysis().temp_size_in_bytes < of_layer / 2


def test_a_step_of_many_rows_copies_no_weights():
    """Each expert has one block of rows there, whichever tokens it gets."""
    found = traced("alike", 24)
    shapes = {
        x.aval.shape for eqn in equations(found.jaxpr.jaxpr) if eqn.primitive.name == "gather" for x in eqn.outvars
    }
    assert not {shape for shape in shapes if shape[1:] in {(D, 2 * F), (F, D)}}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("a dense layer, experts by sigmoid in groups, one shared, windows", marks=REPEATS),
        "experts in every second layer, by context, priority and temperature",
    ],
)
def test_a_text_does_not_depend_on_its_batch(variant):
    model, params = make(variant)
    prompts = [[3 + n % 7, 5, 2 + n % 11, *range(1, 1 + n % 5)] for n in range(12)]
    together = generate(model, params, prompts, max_new_tokens=6).sequences
    assert generate(model, params, prompts[4], max_new_tokens=6).sequences == [together[4]]

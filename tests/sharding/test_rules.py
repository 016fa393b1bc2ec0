"""Activations are split over the mesh that is set, and nothing happens without one. On eight CPU devices."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE, make_model, run, some_tokens
from jax.sharding import AxisType, PartitionSpec

from stellarbyte_jax.model.decoder import logits, param_shapes, param_uses
from stellarbyte_jax.model.linear import linear
from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.model.params import kept_spec, param
from stellarbyte_jax.sharding import (
    ACTIVATION_AXES,
    RULES,
    WEIGHT_AXES,
    axis_size,
    constrain,
    gather,
    kept_spec_of,
    make_mesh,
    spec_of,
    stream_axes,
)
from stellarbyte_jax.sharding.lookup import look_up


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


class Queries(nn.Module):
    @nn.compact
    def __call__(self, x_BTD):
        init = nn.initializers.normal(1.0)
        return linear(self, "q", "BTD,DNH->BTNH", x_BTD, init, embed=8, heads=8, head_dim=4)


def test_the_queries_heads_are_split_over_the_tensor_axis():
    x = jnp.ones((2, 4, 8))
    params = {"q": np.ones((8, 8, 4), np.float32)}
    with jax.set_mesh(mesh(tensor=8)):
        found = jax.jit(lambda p, x: Queries().apply({"params": p}, x))(params, x)
    assert found.sharding.spec == PartitionSpec(None, None, "tensor")
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 4, 1, 4)}
    assert len({shard.device for shard in found.addressable_shards}) == 8


def test_a_mesh_without_the_axis_leaves_the_choice_to_the_compiler():
    x = jnp.ones((8, 4, 8))
    with jax.set_mesh(mesh(data=8)):
        rows = jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data")))
        found = jax.jit(lambda x: constrain(2 * x, (None, None, "heads")))(rows)
    assert found.sharding.spec[0] == "data"
    np.testing.assert_array_equal(found, 2)


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((2, 4))
    assert constrain(x, (None, "heads")) is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, (None, "heads")))(x))


def test_an_axis_without_a_rule_is_an_error():
    with jax.set_mesh(mesh(tensor=8)), pytest.raises(AttributeError, match="headz"):
        constrain(jnp.ones((2, 8)), (None, "headz"))
    with pytest.raises(AttributeError, match="headz"):
        constrain(jnp.ones((2, 8)), (None, "headz"))
    assert "heads" in WEIGHT_AXES and RULES.heads == ("tensor",)


def test_activations_have_axes_that_no_weight_has():
    assert set(ACTIVATION_AXES).isdisjoint(WEIGHT_AXES)
    with pytest.raises(ValueError, match=r"weight w: unknown axes \['act_embed'\]"):
        param_of({"act_embed": 4})


def param_of(axes):
    class Alone(nn.Module):
        @nn.compact
        def __call__(self):
            return param(self, "w", nn.initializers.ones, axes)

    return Alone().init(jax.random.key(0))


def test_rows_of_activations_are_split_over_the_data_axis():
    x = jnp.ones((8, 4, 8))
    params = {"q": np.ones((8, 8, 4), np.float32)}
    with jax.set_mesh(mesh(data=4, tensor=2)):
        found = jax.jit(lambda p, x: Queries().apply({"params": p}, x))(params, x)
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 4, 4, 4)}


@pytest.mark.parametrize(
    ("sizes", "spec", "whole"),
    [
        ({"fsdp": 4, "tensor": 2}, ("tensor", "fsdp"), "4,8"),  # channels stay split
        ({"fsdp": 8}, ("fsdp", None), "8,8"),
    ],
)
def test_weights_are_whole_in_a_product_and_their_gradients_are_split_as_they_are(sizes, spec, whole):
    class Out(nn.Module):
        @nn.compact
        def __call__(self, x_BTF):
            return linear(self, "down", "BTF,FD->BTD", x_BTF, nn.initializers.ones, mlp=8, embed=8)

    weights = {"down": jax.device_put(np.asarray(np.random.default_rng(0).standard_normal((8, 8)), np.float32))}
    x = jax.device_put(np.asarray(np.random.default_rng(1).standard_normal((8, 4, 8)), np.float32))
    grad = jax.grad(lambda p, x: jnp.sum(jnp.sin(Out().apply({"params": p}, x))))
    expected = grad(weights, x)["down"]
    set_mesh = mesh(**sizes)
    with jax.set_mesh(set_mesh):
        kept = jax.NamedSharding(set_mesh, kept_spec_of(("mlp", "embed"), (8, 8), set_mesh))
        assert kept.spec == PartitionSpec(*spec)
        rows = jax.device_put(x, jax.NamedSharding(set_mesh, spec_of(("batch", "sequence", "mlp"), x.shape, set_mesh)))
        compiled = jax.jit(grad).lower(jax.device_put(weights, kept), rows).compile()
        found = compiled(jax.device_put(weights, kept), rows)["down"]
    assert found.sharding.spec == kept.spec
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gathered = re.findall(r"f32\[(\d+,\d+)\]\S* all-gather\(", compiled.as_text())
    assert set(gathered) == {whole}


@pytest.mark.parametrize(("rows", "spec"), [(4, ("tensor", None, None)), (3, (None, "tensor", None))])
def test_norms_are_split_between_layers_after_they_are_cast(rows, spec):
    """Rows where they can be, positions else; a constraint on the float32 result would gather twice the bytes."""
    norm = RMSNorm(BASE)
    with jax.set_mesh(mesh(tensor=4)):
        made = jax.make_jaxpr(lambda x: norm.apply({"params": {"scale": jnp.ones(32)}}, x))(
            jnp.ones((rows, 8, 32), jnp.bfloat16)
        )
    last = made.jaxpr.eqns[-1]
    assert last.primitive.name == "sharding_constraint" and last.invars[0].aval.dtype == jnp.bfloat16
    assert last.params["sharding"].spec == PartitionSpec(*spec)


def test_one_position_is_not_split_between_layers():
    """A step of generation: the sum of a branch takes one collective."""
    assert stream_axes(1)[0] == "batch" and stream_axes(2)[0] == "stream_batch"


def test_gradients_of_a_looked_up_row_are_added_up_in_float32():
    """In bfloat16 a sum of ones stays at 256. Devices exchange them in the dtype of the table."""
    tokens, table = jnp.zeros((8, 128), jnp.int32), jnp.ones((16, 8), jnp.bfloat16)
    for sizes in ({"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        with jax.set_mesh(make_mesh(sizes)):
            grad = jax.grad(lambda table: jnp.sum(look_up(table, tokens).astype(jnp.float32)))
            found, program = jax.jit(grad)(table), str(jax.make_jaxpr(grad)(table))
        assert found.dtype == jnp.bfloat16 and found[0].tolist() == [1024] * 8 and not found[1:].any(), sizes
        sums = re.findall(r"(\w+)\[[^\n]* = psum\w*\[", program)
        assert set(sums) == {"bf16"}, program


def test_parts_are_of_the_first_dimension_that_can_have_them():
    """Where ``tensor`` splits nothing: they lie one after the other."""
    split = mesh(fsdp=4, expert=2)
    assert kept_spec_of(("layers", "mlp", "embed"), (2, 16, 8), split) == PartitionSpec(None, ("fsdp", "expert"), None)
    assert kept_spec_of(("heads", "head_dim", "embed"), (4, 2, 8), split) == PartitionSpec("fsdp", None, "expert")
    assert kept_spec_of(("embed", "heads", "head_dim"), (8, 8, 2), split) == PartitionSpec(
        ("fsdp", "expert"), None, None
    )
    assert kept_spec_of(("vocab", "embed"), (50, 8), split) == PartitionSpec(None, ("fsdp", "expert"))
    assert kept_spec_of(("experts", "mlp", "embed"), (2, 8, 8), split) == PartitionSpec("expert", "fsdp", None)


def test_vectors_are_kept_whole_and_matrices_in_parts():
    model, _ = make_model(BASE)
    uses, shapes = param_uses(model), param_shapes(model)
    layers = uses["layers"]["0"]
    split = make_mesh({"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2})
    norm = kept_spec(layers["attn_norm"]["scale"], shapes["layers"]["0"]["attn_norm"]["scale"].shape, split)
    query = kept_spec(layers["attn"]["q"], shapes["layers"]["0"]["attn"]["q"].shape, split)
    table = kept_spec(uses["embed"]["embedding"], (64, 32), split)
    assert norm == PartitionSpec(None, None)
    assert query == PartitionSpec(None, ("fsdp", "expert"), "tensor", None)
    assert table == PartitionSpec("tensor", ("fsdp", "expert"))


def test_an_axis_of_the_mesh_splits_one_dimension_and_what_it_divides():
    small = mesh(fsdp=2, expert=2, tensor=2)
    assert kept_spec_of(("experts", "embed"), (4, 8), small) == PartitionSpec("expert", "fsdp")
    assert kept_spec_of(("embed",), (6,), small) == PartitionSpec("fsdp")
    assert spec_of(("heads", "mlp"), (3, 8), small) == PartitionSpec(None, "tensor")
    assert spec_of((None, "sequence"), (3, 8), small, unnamed="any") == PartitionSpec("any", "any")
    with jax.set_mesh(small):
        assert axis_size(("fsdp", "tensor", "context")) == 4
    assert axis_size(("fsdp",)) == 1


def test_inside_of_a_shard_map_arrays_are_those_of_one_device():
    def local(x):
        assert constrain(x, ("batch", "heads")) is x and gather(x, ("embed", "mlp")) is x
        return x

    spec = PartitionSpec("data", "tensor")
    with jax.set_mesh(mesh(data=4, tensor=2)):
        jax.shard_map(local, in_specs=spec, out_specs=spec)(jnp.ones((4, 2)))


def test_inside_of_a_shard_map_over_some_axes_the_others_still_split():
    def local(x):
        assert x.shape == (4, 4)  # which the axis that is taken divides once more
        return constrain(2 * x, ("batch", "heads"))

    spec = PartitionSpec("data")
    with jax.set_mesh(mesh(data=4, tensor=2)):
        run = jax.jit(jax.shard_map(local, in_specs=spec, out_specs=spec, axis_names={"data"}))
        found = run(jnp.ones((16, 4)))
    np.testing.assert_array_equal(found, 2)
    assert found.sharding.spec == PartitionSpec("data", "tensor")


def test_a_mesh_does_not_change_the_logits():
    config = dataclasses.replace(BASE, num_attention_heads=8, num_key_value_heads=8, intermediate_size=64)
    model, params = make_model(config)
    tokens = some_tokens(2, 8)
    expected = run(model, params, tokens)
    with jax.set_mesh(mesh(data=1, tensor=8)):
        found = run(model, params, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_split_over_the_vocabulary(tied):
    model, params = make_model(dataclasses.replace(BASE, tie_word_embeddings=tied, vocab_size_multiple=8))
    with jax.set_mesh(mesh(tensor=8)):
        eqns = jax.make_jaxpr(lambda p, x: logits(model, p, x))(params, jnp.ones((2, 3, 32))).jaxpr.eqns
    *_, spec = (eqn.params["sharding"].spec for eqn in eqns if eqn.primitive.name == "sharding_constraint")
    assert spec[2] == "tensor" and "tensor" not in spec[:2]


def test_a_mesh_has_the_axes_of_the_rules_and_the_devices_that_there_are():
    found = make_mesh({"tensor": 2, "data": 3})
    assert dict(found.shape) == {"data": 3, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    assert found.devices.ravel().tolist() == jax.devices()[:6]
    with pytest.raises(ValueError, match="a mesh has no axis 'model'; there are data, fsdp, expert, context, tensor"):
        make_mesh({"model": 2})
    with pytest.raises(ValueError, match="a mesh of 16 devices, and there are 8"):
        make_mesh({"tensor": 16})

"""A weight and its use: made once, used by its spec, and described by a table."""

import dataclasses
import re

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE, VARIANTS, make

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.decoder import ByteTransformer, logical_axes, param_shapes, param_uses
from stellarbyte_jax.model.linear import kernel, linear
from stellarbyte_jax.model.params import FEW_ROWS, WeightUse, letters_of, param, product

NORMAL = nn.initializers.normal(1.0)


class Linear(nn.Module):
    """The linear of the arguments that a test gives it."""

    spec: str
    axes: tuple[tuple[str, int], ...]
    bias: bool = False
    batch: tuple[str, ...] = ()
    out_dtype: str | None = None

    @nn.compact
    def __call__(self, x):
        dtype = None if self.out_dtype is None else jnp.dtype(self.out_dtype)
        more = {"bias": self.bias, "batch": self.batch, "out_dtype": dtype}
        return linear(self, "w", self.spec, x, NORMAL, **more, **dict(self.axes))


def applied(spec, axes, shape, **settings):
    module = Linear(spec, axes, **settings)
    random = np.random.default_rng(0)
    x = random.standard_normal(shape).astype(np.float32)
    boxed = jax.jit(module.init)(jax.random.key(1), x)["params"]
    weights = {name: random.standard_normal(box.shape).astype(box.dtype) for name, box in nn.meta.unbox(boxed).items()}
    uses = {name: box.use for name, box in boxed.items()}
    return jax.jit(module.apply)({"params": weights}, x), x, weights, uses


@pytest.mark.parametrize(
    ("spec", "axes", "shape", "bias_shape", "bias_axes"),
    [
        (
            "BTD,DNH->BTNH",
            (("embed", 6), ("heads", 4), ("head_dim", 2)),
            (2, 3, 6),
            (1, 1, 4, 2),
            ("heads", "head_dim"),
        ),
        ("BTNH,NHD->BTD", (("heads", 4), ("head_dim", 2), ("embed", 6)), (2, 3, 4, 2), (1, 1, 6), ("embed",)),
        ("...D,DF->...F", (("embed", 6), ("mlp", 5)), (2, 3, 6), (5,), ("mlp",)),
        ("DBT,DF->FBT", (("embed", 6), ("mlp", 5)), (6, 2, 3), (5, 1, 1), ("mlp",)),  # not trailing
        (
            "BTD,NDH->BNTH",
            (("heads", 4), ("embed", 6), ("head_dim", 2)),
            (2, 3, 6),
            (1, 4, 1, 2),
            ("heads", "head_dim"),
        ),
    ],
)
def test_the_bias_is_added_where_its_axes_stand(spec, axes, shape, bias_shape, bias_axes):
    found, x, weights, uses = applied(spec, axes, shape, bias=True)
    product = np.einsum(spec, np.float64(x), np.float64(weights["w"]))
    np.testing.assert_allclose(found, product + np.reshape(np.asarray(weights["w_bias"]), bias_shape), atol=1e-5)
    assert uses["w_bias"] == WeightUse(bias_axes)
    assert uses["w"].axes == tuple(name for name, _ in axes)


def test_letters_that_the_result_lacks_are_contracted_and_batch_axes_are_named():
    axes = (("embed", 6), ("gate", 2), ("mlp", 5))
    found, x, weights, uses = applied("BTD,DGF->BTGF", axes, (2, 3, 6), batch=("gate",))
    np.testing.assert_allclose(found, np.einsum("btd,dgf->btgf", x, weights["w"]), atol=1e-5)
    assert uses["w"] == WeightUse(("embed", "gate", "mlp"), contracted=(0,), batch=(1,))
    assert uses["w"].output == (2,) and uses["w"].is_matrix
    # A batch axis that both sides have, as experts would.
    axes = (("gate", 2), ("embed", 6), ("mlp", 5))
    found, x, weights, uses = applied("BGD,GDF->BGF", axes, (3, 2, 6), batch=("gate",))
    np.testing.assert_allclose(found, np.einsum("bgd,gdf->bgf", x, weights["w"]), atol=1e-5)
    assert uses["w"] == WeightUse(("gate", "embed", "mlp"), contracted=(1,), batch=(0,))
    assert uses["w"].stacked("layers") == WeightUse(("layers", "gate", "embed", "mlp"), contracted=(2,), batch=(0, 1))
    assert uses["w"].stacked("layers").output == (3,)


def test_the_product_is_in_the_activations_dtype_unless_another_is_asked_for():
    axes = (("embed", 6), ("mlp", 5))
    weight = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    x = jnp.ones((2, 6), jnp.bfloat16)
    narrow = Linear("BD,DF->BF", axes).apply({"params": {"w": weight}}, x)
    wide = Linear("BD,DF->BF", axes, out_dtype="float32").apply({"params": {"w": weight}}, x)
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = np.asarray(jax.device_put(np.asarray(weight, jnp.bfloat16)), np.float32).sum(axis=0)
    np.testing.assert_allclose(wide[0], rounded, rtol=1e-6)


def test_a_spec_that_does_not_fit_and_unknown_axes_are_refused():
    with pytest.raises(ValueError, match=r"weight w: 'BTD,DNH->BTNH' gives it 3 axes, named are embed, heads\n"):
        applied("BTD,DNH->BTNH", (("embed", 6), ("heads", 4)), (2, 3, 6))
    with pytest.raises(ValueError, match=r"weight w: 'BTD,DXH->BTH' sums over X, which the activations do not have"):
        letters_of("w", "BTD,DXH->BTH", {"embed": 4, "heads": 2, "head_dim": 3})
    with pytest.raises(ValueError, match=r"weight w: unknown axes \['embedd'\]; known are layers, vocab, embed"):
        applied("BTD,DF->BTF", (("embedd", 6), ("mlp", 4)), (2, 3, 6))

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self):
            return param(self, "w", nn.initializers.zeros, {"embed": 2, "width": 3})

    with pytest.raises(ValueError, match=r"unknown axes \['width'\]"):
        Wrong().init(jax.random.key(0))


def test_a_weight_of_another_shape_is_refused():
    module = Linear("BD,DF->BF", (("embed", 6), ("mlp", 5)))
    with pytest.raises(
        ValueError, match=r"weight w has shape \(6, 4\), the config asks for \(6, 5\) \(embed 6, mlp 5\)"
    ):
        module.apply({"params": {"w": jnp.zeros((6, 4))}}, jnp.ones((2, 6)))
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="w"):
        module.apply({"params": {"other": jnp.zeros((6, 4))}}, jnp.ones((2, 6)))


def test_kernel_is_the_matrix_of_linear():
    class Kernel(nn.Module):
        @nn.compact
        def __call__(self):
            return kernel(self, "w", "BD,DF->BF", jnp.dtype("bfloat16"), NORMAL, embed=6, mlp=5)

    boxed = Kernel().init(jax.random.key(0))["params"]
    assert boxed["w"].use == WeightUse(("embed", "mlp"), contracted=(0,))
    assert boxed["w"].value.dtype == jnp.float32
    assert Kernel().apply({"params": nn.meta.unbox(boxed)}).dtype == jnp.bfloat16


L = "layers"
TRACKED = ("load", "utilization", "priority", "bias", "coldness", "twin", "twin_steps")
# Every weight of every variant: axes, contracted, batch, lookup, float32, tracked.
TABLE = {
    "embed/embedding": (("vocab", "embed"), (), (), True, False),
    "lm_head/kernel": (("embed", "vocab"), (0,), (), False, False),
    "final_norm/scale": (("embed",), (), (), False, True),
    "layers/0/attn_norm/scale": ((L, "embed"), (), (0,), False, True),
    "layers/0/mlp_norm/scale": ((L, "embed"), (), (0,), False, True),
    "layers/0/attn_scale": ((L, "embed"), (), (0,), False, False),
    "layers/0/mlp_scale": ((L, "embed"), (), (0,), False, False),
    "layers/0/attn/q": ((L, "embed", "heads", "head_dim"), (1,), (0,), False, False),
    "layers/0/attn/k": ((L, "embed", "kv_heads", "head_dim"), (1,), (0,), False, False),
    "layers/0/attn/v": ((L, "embed", "kv_heads", "head_dim"), (1,), (0,), False, False),
    "layers/0/attn/o": ((L, "heads", "head_dim", "embed"), (1, 2), (0,), False, False),
    "layers/0/attn/q_bias": ((L, "heads", "head_dim"), (), (0,), False, False),
    "layers/0/attn/k_bias": ((L, "kv_heads", "head_dim"), (), (0,), False, False),
    "layers/0/attn/v_bias": ((L, "kv_heads", "head_dim"), (), (0,), False, False),
    "layers/0/attn/o_bias": ((L, "embed"), (), (0,), False, False),
    "layers/0/attn/q_norm/scale": ((L, "head_dim"), (), (0,), False, True),
    "layers/0/attn/k_norm/scale": ((L, "head_dim"), (), (0,), False, True),
    "layers/0/attn/xpos_rate": ((L, "rotary_pairs"), (), (0,), False, True),
    "layers/0/mlp/gate_up": ((L, "embed", "gate", "mlp"), (1,), (0, 2), False, False),
    "layers/0/mlp/gate_up_bias": ((L, "gate", "mlp"), (), (0,), False, False),
    "layers/0/mlp/down": ((L, "mlp", "embed"), (1,), (0,), False, False),
    "layers/0/mlp/down_bias": ((L, "embed"), (), (0,), False, False),
    "layers/0/mlp/norm/scale": ((L, "embed"), (), (0,), False, True),
    "layers/0/moe/experts/gate_up": ((L, "experts", "embed", "gate", "mlp"), (2,), (0, 1, 3), False, False),
    "layers/0/moe/experts/down": ((L, "experts", "mlp", "embed"), (2,), (0, 1), False, False),
    "layers/0/moe/shared/gate_up": ((L, "embed", "gate", "mlp"), (1,), (0, 2), False, False),
    "layers/0/moe/shared/down": ((L, "mlp", "embed"), (1,), (0,), False, False),
    "layers/pool/gate_up": (("experts", "embed", "gate", "mlp"), (1,), (0, 2), False, False),
    "layers/pool/down": (("experts", "mlp", "embed"), (1,), (0,), False, False),
    "layers/0/moe/router/kernel": ((L, "embed", "routed"), (1,), (0,), False, True),
    "layers/0/moe/router/context_in": ((L, "embed", "gate_inside"), (1,), (0,), False, True),
    "layers/0/moe/router/context_out": ((L, "gate_inside", "gate_features"), (1,), (0,), False, True),
    "layers/0/moe/router/position": ((L, "positions", "gate_features"), (), (0,), True, True),
    "layers/0/moe/router/norm/scale": ((L, "gate_features"), (), (0,), False, True),
    "layers/0/moe/router/mlp_gate": ((L, "gate_features", "gate_inside"), (1,), (0,), False, True),
    "layers/0/moe/router/mlp_up": ((L, "gate_features", "gate_inside"), (1,), (0,), False, True),
    "layers/0/moe/router/mlp_down": ((L, "gate_inside", "gate_features"), (1,), (0,), False, True),
    "layers/0/moe/router/temperature": ((L,), (), (0,), False, True),
    **{f"layers/0/moe/router/tracked/{name}": ((L, "routed"), (), (0,), False, True, True) for name in TRACKED},
    "layers/0/moe/router/tracked/steps": ((L,), (), (0,), False, True, True),
}
OF_CONTEXT = ((L, "gate_features", "routed"), (1,), (0,), False, True)  # the last matrix of that gate


def by_path(tree, is_leaf=None):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def uses_of(config: ByteConfig):
    return by_path(param_uses(ByteTransformer(config)), lambda x: isinstance(x, WeightUse))


def test_the_use_of_every_weight_of_every_variant():
    met = set()
    for variant in VARIANTS:
        model, params = make(variant)
        uses = uses_of(model.config)
        assert uses.keys() == by_path(params).keys()
        assert jax.tree.map(np.shape, param_shapes(model)) == jax.tree.map(np.shape, params)
        for path, use in uses.items():
            path = re.sub(r"^layers/\d+/", "layers/0/", path)
            expected = TABLE[path]
            if path.endswith("router/kernel") and model.config.moe.gate == "context":
                expected = OF_CONTEXT
            assert use == WeightUse(*expected), (variant, path)
            met.add(path)
    assert met == TABLE.keys()


@pytest.mark.parametrize(("context", "position"), [(1, 1), (7, 3)])
def test_a_gate_has_half_as_many_features_of_the_position_and_one_at_least(context, position):
    config = dataclasses.replace(BASE, moe={"num_experts": 4, "gate": "context", "context_size": context})
    router = param_shapes(ByteTransformer(config))["layers"]["0"]["moe"]["router"]
    assert router["position"].shape == (BASE.num_hidden_layers, BASE.max_position_embeddings, position)
    assert router["kernel"].shape == (BASE.num_hidden_layers, BASE.hidden_size + context + position, 4)


def test_axes_and_shapes_are_trees_like_the_weights():
    model, params = make("mixed windows, qk norm, bias")
    axes = by_path(logical_axes(model), lambda x: isinstance(x, tuple))
    shapes = by_path(param_shapes(model))
    for path, leaf in by_path(params).items():
        assert (shapes[path].shape, shapes[path].dtype) == (leaf.shape, leaf.dtype)
        assert len(axes[path]) == leaf.ndim
        assert (axes[path][0] == "layers") == path.startswith("layers/")
    assert axes["layers/0/attn/q"] == ("layers", "embed", "heads", "head_dim")
    assert shapes["layers/0/attn/q"].shape == (BASE.num_hidden_layers, 32, 4, 8)


@pytest.mark.parametrize("rows", [FEW_ROWS, FEW_ROWS + 1])
def test_a_product_in_float32_of_few_rows_and_of_parts(rows):
    random = np.random.default_rng(0)
    x = jax.device_put(np.asarray(random.standard_normal((1, rows, 32)), jnp.bfloat16))
    w = jax.device_put(np.asarray(random.standard_normal((32, 8)), np.float32))

    def run(x, w):
        return product("BTD,DE->BTE", x, w, {"D": "embed", "E": "routed"}, precision=jax.lax.Precision.HIGHEST)

    np.testing.assert_allclose(run(x, w), np.asarray(x, np.float64) @ np.asarray(w, np.float64), rtol=1e-5, atol=1e-5)
    assert ("HIGHEST" in str(jax.make_jaxpr(run)(x, w))) == (rows == FEW_ROWS)

"""Products from factors of 8 bits: their values, their gradients, numbers at the ends of their range."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from stellarbyte_jax.ops import float8_product as module
from stellarbyte_jax.ops.float8_product import float8_product

SPECS = {
    "BTD,DNH->BTNH": ((2, 8, 32), (32, 3, 8)),
    "BTNH,NHD->BTD": ((2, 8, 3, 8), (3, 8, 32)),
    "BTD,DGF->BTGF": ((2, 8, 32), (32, 2, 24)),
    "BTF,FD->BTD": ((2, 8, 24), (24, 32)),
}


def rounded(x, dtype):
    """As the paper has it: divided so that the largest number is the type's own, rounded, multiplied again."""
    x = np.asarray(x, np.float64)
    scale = np.float64(np.float32(np.abs(x).max()) / np.float32(ml_dtypes.finfo(dtype).max))
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


def drawn(spec, dtype, scale=1.0):
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(scale * random.standard_normal(shape), dtype) for shape in SPECS[spec])
    y = jax.eval_shape(lambda x, w: float8_product(spec, x, w), x, w)
    return x, w, jnp.asarray(random.standard_normal(y.shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_products_of_rounded_factors(spec, dtype):
    x, w, slope = drawn(spec, dtype)
    y, pull = jax.vjp(lambda x, w: float8_product(spec, x, w), x, w)
    factors, _, result = spec.partition("->")
    of_x, _, of_w = factors.partition(",")
    x8, w8 = rounded(x, ml_dtypes.float8_e4m3fn), rounded(w, ml_dtypes.float8_e4m3fn)
    slope8 = rounded(slope, ml_dtypes.float8_e5m2)
    right = (
        np.einsum(spec, x8, w8),
        np.einsum(f"{result},{of_w}->{of_x}", slope8, w8),
        np.einsum(f"{of_x},{result}->{of_w}", x8, slope8),
    )
    for found, exact in zip((y, *pull(slope)), right, strict=True):
        assert found.dtype == dtype
        error = np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)
        assert error < max(2 * float(jnp.finfo(dtype).eps), 1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 3e3, 1e30])
def test_the_size_of_numbers_does_not_matter(scale):
    spec = "BTF,FD->BTD"
    x, w, slope = drawn(spec, jnp.float32)
    of = lambda factor: jax.vjp(lambda x, w: float8_product(spec, x, w), factor * x, w)  # noqa: E731
    (plain, pull), (scaled, pull_scaled) = of(jnp.float32(1)), of(jnp.float32(scale))
    np.testing.assert_allclose(scaled, scale * plain, rtol=0.2, atol=0.03 * scale * np.abs(plain).max())
    np.testing.assert_allclose(pull_scaled(slope)[0], pull(slope)[0], rtol=1e-5)


def test_the_largest_numbers_are_kept_and_zeros_are_zeros():
    spec = "BTF,FD->BTD"
    x = jnp.full((1, 1, 4), 3.0, jnp.bfloat16).at[0, 0, 3].set(-3.0)
    np.testing.assert_array_equal(float8_product(spec, x, jnp.ones((4, 2), jnp.bfloat16)), [[[6, 6]]])
    y, pull = jax.vjp(lambda x, w: float8_product(spec, x, w), 0 * x, jnp.ones((4, 2), jnp.bfloat16))
    assert np.all(np.asarray(y) == 0) and all(np.all(np.asarray(d) == 0) for d in pull(0 * y))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_go_unseen(bad):
    spec = "BTF,FD->BTD"
    x, w, slope = drawn(spec, jnp.bfloat16)
    y = float8_product(spec, x.at[0, 0, 0].set(bad), w)
    assert not np.isfinite(np.asarray(y, np.float32)).all()
    _, pull = jax.vjp(lambda x, w: float8_product(spec, x, w), x, w)
    assert all(not np.isfinite(np.asarray(d, np.float32)).all() for d in pull(slope.at[0, 0, 0].set(bad)))


def test_factors_have_8_bits_and_nothing_wider_is_kept_for_the_gradients():
    spec = "BTF,FD->BTD"
    x, w, _ = drawn(spec, jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(lambda x, w: float8_product(spec, x, w), x, w)[1], x, w))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) == x.size + w.size + 2 * 4
    text = jax.jit(lambda x, w: float8_product(spec, x, w)).lower(x, w).as_text()
    assert "f8E4M3FN" in text
    text = jax.jit(jax.grad(lambda x, w: float8_product(spec, x, w).astype(jnp.float32).sum())).lower(x, w).as_text()
    assert "f8E5M2" in text


def test_an_older_gpu_is_refused(monkeypatch):
    class Gpu:
        compute_capability = "8.0"

    monkeypatch.setattr(module.jax, "devices", lambda: [Gpu()])
    with pytest.raises(NotImplementedError, match=r"need a GPU of compute capability 8\.9, not 8\.0"):
        jax.eval_shape(lambda x, w: float8_product("BTF,FD->BTD", x, w), *drawn_shapes())
    Gpu.compute_capability = "9.0"
    jax.eval_shape(lambda x, w: float8_product("BTF,FD->BTD", x, w), *drawn_shapes())
    Gpu.compute_capability = "12.0"
    jax.eval_shape(lambda x, w: float8_product("BTF,FD->BTD", x, w), *drawn_shapes())


def drawn_shapes():
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SPECS["BTF,FD->BTD"]]

"""Kernels of the grouped product without a GPU: they are compiled for one as far as a CPU can, and interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import REPEATS
from helpers.grouped import NAMES, assert_rounded, drawn, exact, poisoned, with_gradients

from stellarbyte_jax.ops.expert_layout import lay_out_unaligned
from stellarbyte_jax.ops.expert_mlp import expert_mlp
from stellarbyte_jax.ops.grouped_matmul import Groups
from stellarbyte_jax.ops.grouped_matmul import grouped_matmul as by_name
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas import grouped_matmul as module
from stellarbyte_jax.ops.pallas.grouped_matmul import grouped_matmul, refusal
from stellarbyte_jax.ops.pallas.grouped_rows import Tuning, grouped_rows

SMALL = Tuning(columns=128, stages=2)
# A window that is moved back, an empty group, small ones, one with both ends in the same 64 rows, and rows behind.
ROWS, SIZES = 144, [90, 0, 30, 7]
reads_transposed = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not know transposed matrices"
)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups"),
    [
        (16384, 2048, 1408, 64),
        pytest.param(16384, 1408, 2048, 64, marks=REPEATS),
        pytest.param(131072, 4096, 1536, 128, marks=REPEATS),
        (64, 64, 64, 1),
        pytest.param(1000, 192, 320, 3, marks=REPEATS),
    ],
)
def test_the_kernels_can_be_lowered_for_a_gpu(hopper, rows, inputs, outputs, groups):
    shapes = (rows, inputs), (groups, inputs, outputs), (rows, outputs)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    program = jax.jit(with_gradients(grouped_matmul)).trace(*arrays, sizes).lower(lowering_platforms=("cuda",))
    text = program.as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
    for kernel in ("grouped_matmul", "grouped_matmul_dx", "grouped_matmul_dw"):
        assert f"{kernel}_mosaic_gpu" in text
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize(("outputs", "columns"), [(192, 128), (192, 192), (320, 256), (384, 256)])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # rows that nobody reads
def test_the_product_in_the_interpreter(outputs, columns):
    x, w, dy = drawn(ROWS, 128, outputs, 4)
    tuning = Tuning(columns, 2)
    run = jax.jit(lambda x, w, s: grouped_rows(x, w, s, transpose=False, tuning=tuning))
    (x_bad,) = poisoned(SIZES, x)
    with compat.interpreted():
        found = run(x_bad, w, jax.device_put(np.asarray(SIZES, np.int32)))
        assert_rounded(found, exact(x, w, dy, SIZES)[0], "the product")


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # rows that nobody reads
@reads_transposed
@pytest.mark.parametrize("columns", [128, 192])
def test_the_product_and_its_gradients_in_the_interpreter(monkeypatch, columns):
    for of_which in ("tuning", "tuning_of_matrices"):
        monkeypatch.setattr(module, of_which, lambda *of: Tuning(columns, 2))
    x, w, dy = drawn(ROWS, 64, 192, 4)
    x_bad, dy_bad = poisoned(SIZES, x, dy)
    with compat.interpreted():
        found = jax.jit(with_gradients(grouped_matmul))(x_bad, w, dy_bad, jax.device_put(np.asarray(SIZES, np.int32)))
        for name, ours, right in zip(NAMES, found, exact(x, w, dy, SIZES), strict=True):
            assert_rounded(ours, right, name)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("columns", [64, 128, 192])
def test_tiles_of_all_widths_can_be_lowered_for_a_gpu(columns, transpose):
    x, w = jnp.ones((512, 512), jnp.bfloat16), jnp.ones((3, 512, 512), jnp.bfloat16)
    tuning = Tuning(columns, 4)
    run = jax.jit(lambda x, w, s: grouped_rows(x, w, s, transpose=transpose, tuning=tuning))
    program = run.trace(x, w, jnp.zeros(3, jnp.int32)).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("custom_call @mosaic_gpu") == 1


@reads_transposed
@pytest.mark.parametrize(
    "sizes", [[64, 128, 0, 22], [40, 192, 30, 256, 64, 60]]
)  # whole tiles beside some that are cut
def test_warpgroups_wait_for_each_other(monkeypatch, sizes):
    # Where a group of 64 rows or more ends within a window, two windows write the same: the detector minds that too.
    for of_which in ("tuning", "tuning_of_matrices"):
        monkeypatch.setattr(module, of_which, lambda *of: SMALL)
    rows = sum(sizes) // 8 * 8 + 16
    x, w, dy = drawn(rows, 128, 192, len(sizes))
    with compat.interpreted(detect_races=True):
        found = with_gradients(grouped_matmul)(x, w, dy, jax.device_put(np.asarray(sizes, np.int32)))
    for name, ours, right in zip(NAMES, found, exact(x, w, dy, sizes), strict=True):
        assert_rounded(ours, right, name)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "reason"),
    [
        (128, 64, 64, jnp.float32, "both factors must be bfloat16 or both float16, not float32 and float32"),
        (63, 64, 64, jnp.bfloat16, "there must be at least 64 rows, not 63"),
        (129, 64, 64, jnp.bfloat16, "rows must be a multiple of 8, not 129"),
        (128, 72, 64, jnp.bfloat16, "inputs and outputs must be multiples of 64, not 72 and 64"),
        (128, 64, 32, jnp.float16, "inputs and outputs must be multiples of 64, not 64 and 32"),
    ],
)
def test_what_the_kernels_refuse(hopper, rows, inputs, outputs, dtype, reason):
    x, w = jnp.ones((rows, inputs), dtype), jnp.ones((2, inputs, outputs), dtype)
    assert refusal(x, w) == reason
    with pytest.raises(NotImplementedError, match=f"grouped_matmul: pallas refused: {reason}"):
        by_name(x, w, Groups(jax.device_put(np.asarray([3, 4], np.int32)), None), implementation="pallas")


def test_another_device_is_refused_by_name_and_passed_by():
    x, w, dy = drawn(128, 64, 64, 2)
    groups = Groups(jax.device_put(np.asarray([64, 64], np.int32)), None)
    with pytest.raises(NotImplementedError, match=r"pallas refused: .* Hopper GPU \(compute capability 9.0\)"):
        by_name(x, w, groups, implementation="pallas")
    np.testing.assert_allclose(
        np.asarray(by_name(x, w, groups), np.float64), exact(x, w, dy, [64, 64])[0], rtol=2**-7, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # rows that nobody reads
@reads_transposed
@pytest.mark.parametrize(("K", "E"), [(3, 4), pytest.param(1, 1, marks=REPEATS), pytest.param(3, 3, marks=REPEATS)])
def test_experts_from_tokens_to_sums_by_kernels_in_the_interpreter(monkeypatch, K, E):
    """Values and all gradients are as near to those of float32 as what XLA computes."""
    for of_which in ("tuning", "tuning_of_matrices"):
        monkeypatch.setattr(module, of_which, lambda *of: SMALL)
    N, D, F = 31, 256, 128  # channels of which the kernels move rows too, and two parts to be woven
    random = np.random.default_rng(0)
    experts = jax.device_put(np.asarray(np.stack([random.permutation(E + 1)[:K] for _ in range(N)]), np.int32))
    shapes = (N, D), (E, D, 2 * F), (E, F, D)
    inputs = [jnp.asarray(0.3 * random.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    weights, d = (jax.device_put(np.asarray(random.random((N, size)), np.float32)) for size in (K, D))
    layout = lay_out_unaligned(experts, E)

    @partial(jax.jit, static_argnums=0)
    def values(implementation, *inputs):
        y, pull = jax.vjp(lambda *x: expert_mlp("silu", *x, layout, implementation=implementation), *inputs, weights)
        return y, *pull(d)

    exact = values("xla", *(x.astype(jnp.float32) for x in inputs))
    rounded = values("xla", *inputs)
    with compat.interpreted():
        found = values("pallas", *inputs)
        for ours, theirs, right in zip(found, rounded, exact, strict=True):
            ours, theirs, right = (np.asarray(x, np.float64) for x in (ours, theirs, right))
            assert np.linalg.norm(ours - right) < 1.01 * np.linalg.norm(theirs - right) < 6e-3 * np.linalg.norm(right)


def test_experts_take_kernels_for_products_moves_and_sums(hopper):
    E, D, F = 4, 256, 128
    shapes = ((40, D), jnp.bfloat16), ((E, D, 2 * F), jnp.bfloat16), ((E, F, D), jnp.bfloat16), ((40, 3), jnp.float32)
    arrays = [jax.ShapeDtypeStruct(*each) for each in shapes]

    def loss(*inputs):
        layout = lay_out_unaligned(jnp.zeros((40, 3), jnp.int32), E)
        return jnp.sum(jnp.sin(expert_mlp("silu", *inputs, layout, implementation="pallas")))

    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert (
        text.count("custom_call @mosaic_gpu") == 6 + 5 + 1
    )  # tokens, cotangents and tokens again; outputs and slopes; gates
    for kernel in (
        "grouped_matmul",
        "grouped_matmul_dx",
        "grouped_matmul_dw",
        "spread_rows",
        "sum_rows",
        "gated_products",
        "gated_backward",
    ):
        assert f"{kernel}_mosaic_gpu" in text


def test_tiles_are_wide_where_few_columns_of_the_last_one_are_empty():
    assert [module.tuning(columns).columns for columns in (768, 2048, 1408, 1024)] == [192, 192, 128, 128]
    assert [module.tuning_of_matrices(columns).columns for columns in (768, 1408, 1024)] == [192, 192, 128]

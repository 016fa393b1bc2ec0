"""The head's loss by a kernel, without a GPU: interpreted, and compiled for one as far as a CPU can."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.heads import HEADS, assert_near, head, of_loss
from jax.sharding import PartitionSpec

from stellarbyte_jax.ops.cross_entropy import Gradients as Wanted
from stellarbyte_jax.ops.cross_entropy import Terms, cross_entropy_in_chunks, linear_cross_entropy
from stellarbyte_jax.ops.pallas import compat
from stellarbyte_jax.ops.pallas.logits import logits, refusal


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "runs_here", lambda: True)


@pytest.mark.parametrize("case", HEADS)
def test_the_loss_and_its_gradients_in_the_interpreter(case):
    given, options = head(**HEADS[case])
    exact = of_loss(linear_cross_entropy, jnp.float32, given, options)
    rounded = of_loss(linear_cross_entropy, jnp.bfloat16, given, options)
    with compat.interpreted():
        found = of_loss(linear_cross_entropy, jnp.bfloat16, given, options, implementation="pallas")
    assert_near(found, rounded, exact)


def test_what_is_kept_of_logits():
    (x, kernel, targets, _), _ = head()
    with compat.interpreted():
        found = logits(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), targets, 300)
    right = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    right[:, 300:] = -1e30
    targets = np.asarray(targets)
    for tile in range(3):
        mine = right[:, tile * 128 : (tile + 1) * 128]
        below = mine - mine.max(1, keepdims=True)
        kept = np.asarray(found.below_XV[:, tile * 128 : (tile + 1) * 128], np.float64)
        np.testing.assert_allclose(kept, below, rtol=2**-8, atol=1e-5)
        np.testing.assert_allclose(found.sums_TX[tile], np.exp(below).sum(1), rtol=1e-5)
        is_target = (targets // 128 == tile)[:, None] & (np.arange(128) == targets[:, None] % 128)
        others = np.where(is_target, -1e30, mine).max(1)
        np.testing.assert_allclose(found.others_TX[tile], others, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.target_TX[tile], np.where(is_target, mine, 0).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 does not look for races")
def test_warpgroups_wait_for_each_other():
    (x, kernel, targets, _), _ = head(tokens=256)
    with compat.interpreted(detect_races=True):
        jax.block_until_ready(logits(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), targets, 384))


def test_a_vocabulary_over_devices():
    """Each of two devices has half of the columns, with padding in the last one's."""
    (x, kernel, targets, _), _ = head(columns=512, words=400)
    terms = Terms(0.1, 1e-3, 400, 64, "pallas")
    mesh = jax.make_mesh((2,), ("v",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def run(terms):
        def local(x, kernel):
            product, wanted = (x, kernel, None), Wanted(True, True, False)
            sums, found = cross_entropy_in_chunks(product, targets, terms, wanted=wanted, vocab_axis="v")
            return sums, jax.lax.psum(found.x, "v"), found.kernel

        halves = PartitionSpec(None, "v")
        specs = dict(in_specs=(PartitionSpec(), halves), out_specs=(PartitionSpec(), PartitionSpec(), halves))
        return jax.shard_map(local, mesh=mesh, **specs, check_vma=False)(x, kernel)

    with compat.interpreted():
        found = jax.block_until_ready(run(terms))
    right = run(terms._replace(implementation="xla"))
    np.testing.assert_allclose(found[0], right[0], rtol=1e-5)
    for ours, theirs in zip(found[1:], right[1:], strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) < 5e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("words", [32000, 31999])
def test_the_loss_can_be_lowered_for_a_gpu(hopper, words):
    shapes = ((8192, 768), jnp.bfloat16), ((768, 32000), jnp.bfloat16), ((8192,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*each) for each in shapes]
    loss = lambda *x: linear_cross_entropy(*x, vocab_size=words, implementation="pallas")[0]  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1 and "logits_mosaic_gpu" in text


@pytest.mark.parametrize(
    ("tokens", "inputs", "columns", "dtype", "reason"),
    [
        (128, 64, 96, jnp.bfloat16, "the head must have a multiple of 128 columns, not 96"),
        (128, 72, 128, jnp.bfloat16, "inputs and outputs must be multiples of 64, not 72 and 128"),
        (128, 64, 128, jnp.float32, "both factors must be bfloat16 or both float16, not float32 and float32"),
        (32, 64, 128, jnp.bfloat16, "there must be at least 64 rows, not 32"),
        (128, 64, 128, jnp.float16, None),
    ],
)
def test_what_the_kernel_refuses(hopper, tokens, inputs, columns, dtype, reason):
    x, kernel = jax.ShapeDtypeStruct((tokens, inputs), dtype), jax.ShapeDtypeStruct((inputs, columns), dtype)
    assert refusal(x, kernel) == reason


def test_refusals_reach_the_caller(hopper):
    given, options = head()
    low = jnp.ones((136, 4)), jnp.ones((4, 384))
    with pytest.raises(NotImplementedError, match=r"loss\.implementation: pallas refused: the head has an adapter"):
        of_loss(linear_cross_entropy, jnp.bfloat16, given, options, implementation="pallas", low=low)
    with pytest.raises(
        NotImplementedError, match=r"loss\.implementation: pallas refused: both factors must be bfloat16"
    ):
        of_loss(linear_cross_entropy, jnp.float32, given, options, implementation="pallas")


def test_a_loss_without_gradients_needs_no_kernel():
    (x, kernel, targets, _), _ = head()
    found = linear_cross_entropy(x, kernel, targets, implementation="pallas")[0]
    np.testing.assert_allclose(found, linear_cross_entropy(x, kernel, targets)[0], rtol=1e-6)

"""The loss of the head, split by tokens and by the vocabulary. On eight CPU devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stellarbyte_jax.ops import cross_entropy as op
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.cross_entropy import linear_cross_entropy, token_losses

B, T, D, V, WORDS = 8, 16, 12, 64, 50
AXES = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
RANDOM = np.random.default_rng(0)
X = jax.device_put(np.asarray(RANDOM.standard_normal((B, T, D)), np.float32))
KERNEL = jax.device_put(np.asarray(RANDOM.standard_normal((D, V)), np.float32))
TARGETS = jax.device_put(np.asarray(RANDOM.integers(-3, WORDS, (B, T)), np.int32))


def value_and_gradients(function, *args, x=X, **options):
    def loss(x, kernel):
        total, sums = function(x, kernel, *args, **options)
        return total, sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, KERNEL)


@pytest.mark.parametrize(
    "mesh",
    [
        {"tensor": 8},
        {"data": 2, "tensor": 4},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"fsdp": 4, "data": 2},
        {"tensor": 3},
    ],
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.3, "vocab_size": WORDS}])
def test_sums_and_gradients_are_those_of_one_device(mesh, options):
    flat = X.reshape(-1, D)
    (total, sums), (dx, dkernel) = value_and_gradients(
        lambda x, kernel: op.linear_cross_entropy(x.reshape(flat.shape), kernel, TARGETS.reshape(-1), **options)
    )
    with jax.set_mesh(make_mesh({**AXES, **mesh})):
        (found, found_sums), gradients = value_and_gradients(linear_cross_entropy, TARGETS, chunk_size=8, **options)
    np.testing.assert_allclose(found, total, rtol=1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(found_sums[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(gradients[0], dx, atol=5e-5)
    np.testing.assert_allclose(gradients[1], dkernel, atol=1e-4)


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_an_adapter_of_the_head_on_a_mesh(mesh):
    """With a kernel that is not trained, whose gradient no device makes."""
    h = jax.device_put(np.asarray(RANDOM.standard_normal((B, T, 3)), np.float32))
    b = jax.device_put(np.asarray(RANDOM.standard_normal((3, V)), np.float32))

    def slopes(x, h, b):
        def loss(x, h, b):
            return linear_cross_entropy(x, KERNEL, TARGETS, low=(h, b), vocab_size=WORDS, chunk_size=8)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, h, b)

    def losses(x, h, b):
        return token_losses(x, KERNEL, TARGETS, low=(h, b), vocab_size=WORDS)

    expected, expected_losses = jax.jit(slopes)(X, h, b), jax.jit(losses)(X, h, b)
    with jax.set_mesh(make_mesh({**AXES, **mesh})):
        found, found_losses = jax.jit(slopes)(X, h, b), jax.jit(losses)(X, h, b)
        products = str(jax.make_jaxpr(slopes)(X, h, b)).count("dot_general")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected)
    np.testing.assert_allclose(found_losses, expected_losses, atol=2e-5)
    assert products == 5  # of logits, of the adapter in them, and of x, h and b


def test_positions_that_devices_do_not_divide_stay_whole():
    """Rows of 15: each device of the vocabulary has the gradient of all of them."""
    x, targets = X[:, :15], TARGETS[:, :15]

    def alone(x, kernel):
        return op.linear_cross_entropy(x.reshape(-1, D), kernel, targets.reshape(-1))

    (total, _), (dx, dkernel) = value_and_gradients(alone, x=x)
    with jax.set_mesh(make_mesh({**AXES, "data": 2, "tensor": 4})):
        (found, _), gradients = value_and_gradients(linear_cross_entropy, targets, x=x)
    np.testing.assert_allclose(found, total, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], dx, atol=5e-5)
    np.testing.assert_allclose(gradients[1], dkernel, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "tied", "kept", "B", "rows_and_positions"),
    [
        ({"fsdp": 4, "tensor": 2}, False, ("fsdp", "tensor"), 8, (1, T)),
        # Of rows that all devices together do not divide, ``tensor`` has positions of the gradient.
        ({"fsdp": 4, "tensor": 2}, True, ("fsdp", "tensor"), 4, (1, T // 2)),
        ({"fsdp": 4}, False, ("fsdp", None), 8, (2, T)),
        ({"fsdp": 4}, True, (None, "fsdp"), 8, (2, T)),  # the table [V, D] has its parts of V
    ],
)
def test_each_device_makes_the_logits_of_its_tokens_and_its_columns(sizes, tied, kept, B, rows_and_positions):
    mesh = make_mesh({**AXES, **sizes})
    with jax.set_mesh(mesh):
        kept = NamedSharding(mesh, PartitionSpec(*kept))
        rows = NamedSharding(mesh, PartitionSpec("fsdp"))
        given = jax.device_put(X[:B], rows), jax.device_put(KERNEL, kept), jax.device_put(TARGETS[:B], rows)

        def loss(x, kernel, targets):
            return linear_cross_entropy(x, kernel, targets, tied=tied)[0]

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*given).compile()
        dx, dkernel = compiled(*given)
    columns = V // sizes.get("tensor", 1)
    logits = re.findall(rf"= f32\[(\d+),{columns}\]\S* dot\(", compiled.as_text())
    assert logits and set(logits) <= {str(B * T // 4), str(D)}  # and the gradient of the kernel
    assert columns == V or f"{V}]{{1,0}} dot(" not in compiled.as_text()
    assert dkernel.sharding.is_equivalent_to(kept, 2)
    assert dx.sharding.shard_shape(dx.shape) == (*rows_and_positions, D)
    flat, targets = X[:B].reshape(-1, D), TARGETS[:B].reshape(-1)
    alone = jax.grad(lambda x, kernel: op.linear_cross_entropy(x, kernel, targets)[0], argnums=(0, 1))
    for found, expected in zip((dx, dkernel), jax.jit(alone)(flat, KERNEL), strict=True):
        np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, atol=1e-4)


def test_a_tie_between_devices_is_no_hit():
    kernel = jnp.zeros((D, V)).at[:, 3].set(1.0).at[:, 60].set(1.0)
    targets = jnp.full((B, T), 3, jnp.int32)
    with jax.set_mesh(make_mesh({**AXES, "tensor": 8})):
        run = jax.jit(lambda kernel: linear_cross_entropy(jnp.ones((B, T, D)), kernel, targets)[1]["correct"])
        assert float(run(kernel)) == 0
        assert float(run(kernel.at[:, 60].set(0.5))) == B * T


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_weights_and_losses_of_tokens_are_those_of_one_device(mesh):
    weights = jax.device_put(np.asarray(RANDOM.random((B, T)), np.float32))
    (total, sums), gradients = value_and_gradients(linear_cross_entropy, TARGETS, weights)
    losses, of_all = (token_losses(X, KERNEL, TARGETS, vocab_size=words) for words in (WORDS, None))
    with jax.set_mesh(make_mesh({**AXES, **mesh})):
        (found, found_sums), found_gradients = value_and_gradients(linear_cross_entropy, TARGETS, weights)
        found_losses = jax.jit(partial(token_losses, vocab_size=WORDS))(X, KERNEL, TARGETS)
        found_of_all = jax.jit(token_losses)(X, KERNEL, TARGETS)
    np.testing.assert_allclose(found, total, rtol=1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(found_sums[name], value, rtol=1e-6, err_msg=name)
    for a, b in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(found_losses, losses, atol=2e-5)
    np.testing.assert_allclose(found_of_all, of_all, atol=2e-5)
    assert losses.shape == (2, B, T)

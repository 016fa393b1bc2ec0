"""Attention whose rows, heads and positions are split over devices. On eight CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import REPEATS
from helpers.rows_on_a_mesh import AXES, B, H, T, arrays, mask_of, output_and_gradients

from stellarbyte_jax.ops import attention as op
from stellarbyte_jax.ops.attention import Dropout, Mask
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.attention import attention
from stellarbyte_jax.sharding.ring import dealt_order


@pytest.mark.parametrize(
    ("devices", "kind", "softcap"),
    [
        pytest.param(2, "plain", None, marks=REPEATS),
        (8, "plain", 2.0),
        (2, "packed", 2.0),
        pytest.param(8, "packed", None, marks=REPEATS),
        pytest.param(2, "window", None, marks=REPEATS),
        (8, "window", 2.0),
        pytest.param(2, "packed, window, sinks", 2.0, marks=REPEATS),
        (8, "packed, window, sinks", None),
    ],
)
def test_rows_that_are_split_by_position(devices, kind, softcap):
    *given, slope = arrays()
    order = dealt_order(T, devices)

    def whole(q, k, v):
        return op.attention(q, k, v, mask_of(kind), softcap=softcap, implementation="reference").out_BTNH

    def ring(q, k, v):
        return attention(q, k, v, mask_of(kind, order), softcap=softcap, dealt=True).out_BTNH

    expected = output_and_gradients(whole, given, slope)
    with jax.set_mesh(make_mesh({**AXES, "context": devices, "data": 8 // devices})):
        found = output_and_gradients(ring, [x[:, order] for x in given], slope[:, order])
    for name, a, b in zip(("output", "queries", "keys", "values"), found, expected, strict=True):
        np.testing.assert_allclose(a, b[:, order], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_device_has_as_many_scores(devices):
    order = dealt_order(48 * devices, devices)
    assert sorted(order) == list(range(48 * devices))
    earlier = (order + 1).reshape(devices, -1).sum(axis=1)
    assert len(set(earlier)) == 1


def test_keys_are_passed_to_the_next_device_and_never_gathered():
    *given, slope = arrays()
    order = dealt_order(T, 4)
    with jax.set_mesh(make_mesh({**AXES, "context": 4, "data": 2})) as _:
        spec = jax.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec("data", "context"))
        places = [jax.device_put(x[:, order], spec) for x in (*given, slope)]

        def loss(q, k, v, slope):
            return jnp.sum(attention(q, k, v, mask_of("plain", order), dealt=True).out_BTNH * slope)

        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*places).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize(("N", "K", "tensor"), [(8, 4, 4), (8, 2, 8), (8, 2, 4), (8, 1, 2), (6, 3, 4)])
def test_heads_are_split_and_several_devices_may_read_one_of_keys_and_values(N, K, tensor):
    *given, slope = arrays(N, K)
    expected = output_and_gradients(lambda *x: op.attention(*x, mask_of("packed")).out_BTNH, given, slope)
    mesh = make_mesh({**AXES, "tensor": tensor, "fsdp": 8 // tensor})
    with jax.set_mesh(mesh):
        found = output_and_gradients(lambda *x: attention(*x, mask_of("packed")).out_BTNH, given, slope)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    heads = found[0].sharding.shard_shape(found[0].shape)[2]
    assert heads == (N if N % tensor else N // tensor)


@pytest.mark.parametrize("K", [4, 2])
def test_keys_of_a_cache_that_each_head_prunes_for_itself(K):
    """Slots hold other positions for every head: they are split as the heads are, or not at all."""
    q, k, v, _ = arrays(8, K)
    rows = np.random.default_rng(0)
    slots = np.stack([[rows.permutation(T) for _ in range(K)] for _ in range(B)]).swapaxes(1, 2)
    slots = jax.device_put(np.asarray(np.where(slots < T // 2, slots, -1), np.int32))
    mask = Mask(jnp.arange(T, dtype=jnp.int32)[None], slots)
    expected = op.attention(q, k, v, mask).out_BTNH
    with jax.set_mesh(make_mesh({**AXES, "tensor": 4, "data": 2})):
        found = jax.jit(lambda *x: attention(*x, mask).out_BTNH)(q, k, v)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_weights_of_a_cache_are_those_of_one_device():
    """Where they are asked for, heads are split with those that read the same keys, or not at all."""
    for K in (4, 2):
        q, k, v, _ = arrays(8, K)
        expected = op.attention(q, k, v, mask_of("plain"), return_weights=True).weights_BKGTS
        with jax.set_mesh(make_mesh({**AXES, "tensor": 4, "data": 2})):
            found = jax.jit(lambda q, k, v: attention(q, k, v, mask_of("plain"), return_weights=True))(q, k, v)
        np.testing.assert_allclose(found.weights_BKGTS, expected, atol=1e-6)


def test_dropout_differs_from_device_to_device():
    """With all queries, keys and values alike, outputs differ by what was dropped alone."""
    q, k, v = jnp.zeros((B, T, 8, H)), jnp.zeros((B, T, 8, H)), jnp.ones((B, T, 8, H))
    with jax.set_mesh(make_mesh({**AXES, "data": 2, "tensor": 4})):
        dropout = Dropout(0.5, jax.random.key(0))
        out = np.asarray(jax.jit(lambda *x: attention(*x, mask_of("plain"), dropout=dropout).out_BTNH)(q, k, v))
    ways = {out[row : row + 2, :, head : head + 2].tobytes() for row in (0, 2) for head in (0, 2, 4, 6)}
    assert len(ways) == 8
    np.testing.assert_allclose(out[:, T // 2 :].mean(), 1, atol=0.02)


def test_what_a_ring_cannot_do_is_refused():
    q, k, v, _ = arrays()
    with jax.set_mesh(make_mesh({**AXES, "context": 8})):
        with pytest.raises(
            NotImplementedError, match=r"attention_dropout over rows that are split by position: set mesh"
        ):
            attention(q, k, v, mask_of("plain"), dropout=Dropout(0.5, jax.random.key(0)), dealt=True)
        with pytest.raises(NotImplementedError, match="attention_prune_below"):
            attention(q, k, v, mask_of("plain"), prune_below=0.1, dealt=True)
        with pytest.raises(NotImplementedError, match="split by position: cudnn refused: the cpu backend"):
            attention(q, k, v, mask_of("plain"), implementation="cudnn", dealt=True)
        with pytest.raises(
            ValueError, match=r"split by position: no implementation 'reference'; there are auto, cudnn, xla, pallas"
        ):
            attention(q, k, v, mask_of("plain"), implementation="reference", dealt=True)

"""The fused kernels of cuDNN: the bounds of packed documents, and that the kernel really runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.attention import Mask, attention
from stellarbyte_jax.ops.attention.cudnn import segment_bounds


def test_each_run_of_equal_ids_has_a_start_and_a_length():
    ids = jax.device_put(np.asarray([[1, 1, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1]], np.int32))
    starts, lengths, count = segment_bounds(ids, 4)
    np.testing.assert_array_equal(starts, [[0, 2, 3, 5], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, 1, 2, 1], [6, -1, -1, -1]])
    np.testing.assert_array_equal(count, [4, 1])


def packed(max_segments, T=None, S=128):
    """Row 0 holds five runs, row 1 one; the queries are the last T tokens."""
    T = T or S
    ids = np.ones((2, S), np.int32)
    for number, start in enumerate((20, 50, 51, 110), 2):
        ids[0, start:] = number
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, n, 4, 64), jnp.bfloat16) for key, n in zip(keys, (T, S, S), strict=True))
    rows = jnp.arange(S, dtype=jnp.int32)[None]
    ids = jax.device_put(ids)
    documents = {"q_segments_BT": ids[:, S - T :], "k_segments_BS": ids, "max_segments": max_segments}
    return q, k, v, Mask(rows[:, S - T :], rows[..., None], window=40, aligned=True, **documents)


@pytest.mark.gpu
def test_too_many_documents_for_the_fused_kernel_are_loud():
    out = attention(*packed(3), implementation="cudnn").out_BTNH
    assert np.isnan(np.asarray(out[0], np.float32)).all()
    assert np.isfinite(np.asarray(out[1], np.float32)).all()


@pytest.mark.gpu
def test_queries_behind_a_memory_get_what_the_reference_gives_them():
    """Fewer queries than keys: empty ones are put in front of them and cut off again."""
    q, k, v, mask = packed(6, T=48)

    def loss(q, k, v, implementation):
        out = attention(q, k, v, mask, implementation=implementation).out_BTNH.astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    both = [jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v, name) for name in ("cudnn", "reference")]
    for a, b in zip(*(jax.tree.leaves(x) for x in both), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert a.shape == b.shape
        assert jnp.linalg.norm(a - b) < 2e-2 * jnp.linalg.norm(b)


@pytest.mark.gpu
def test_auto_takes_the_fused_kernel():
    q, k, v, mask = packed(6)
    text = jax.jit(lambda q: attention(q, k, v, mask).out_BTNH).lower(q).as_text()
    assert "cudnn" in text

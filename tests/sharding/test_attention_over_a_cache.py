"""Attention over a cache whose rows and heads are split: each device reads its own part of what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decode_cases import cached
from helpers.rows_on_a_mesh import AXES

from stellarbyte_jax.model.state.storage import Storage
from stellarbyte_jax.ops.attention import IMPLEMENTATIONS
from stellarbyte_jax.ops.attention import attention as whole
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.attention import attention


@pytest.mark.parametrize(("data", "tensor"), [(4, 2), (2, 4), (8, 1)])
def test_what_is_stored_is_split_as_keys_and_values_are(data, tensor, monkeypatch):
    seen = []

    def of_stored(q, k, v, mask, options):
        stored = options.stored
        seen.append(None if stored is None else stored.key_scales.shape)
        if stored is not None:
            storage = Storage(stored.keys, stored.values, stored.key_scales, stored.value_scales, stored.dtype)
            k, v = storage.layer(stored.layer).decode(q.dtype)
            beyond_BS = jnp.arange(k.shape[1])[None] >= stored.ends_B[:, None]
            k = jnp.where(beyond_BS[..., None, None], 100.0, k)  # of slots that nobody sees
        return IMPLEMENTATIONS["reference"](q, k, v, mask, options)

    q, k, v, storage, mask = cached(B=8, S=32, N=8, K=2, H=8, dtype="int8", compute="float32", window=9)
    expected = whole(q, k, v, mask).out_BTNH
    ends_B = jnp.max(mask.k_positions_BSK[:, :, 0], axis=1) + 1
    monkeypatch.setitem(IMPLEMENTATIONS, "pallas", of_stored)
    with jax.set_mesh(make_mesh({**AXES, "data": data, "tensor": tensor})):
        stored = storage.stored(jnp.int32(1), ends_B)
        run = jax.jit(lambda *x: attention(*x[:-1], stored=x[-1], implementation="pallas").out_BTNH)
        found = run(q, k, v, mask, stored)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # With more devices than heads each slices one of the heads that it has, which is stored nowhere.
    assert seen == [(2, 8 // data, 2 // tensor, 32) if tensor <= 2 else None]

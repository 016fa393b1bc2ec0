"""RMSNorm against torch, and its two rules about small numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops.norm import rms_norm


def test_rms_norm_equals_torch():
    torch = pytest.importorskip("torch", reason="the peer of this test")
    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    scale = np.linspace(0.5, 2, 16, dtype=np.float32)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (16,), torch.from_numpy(scale), 1e-3).numpy()
    np.testing.assert_allclose(rms_norm(jax.device_put(x), jax.device_put(scale), eps=1e-3), theirs, atol=1e-6)


def test_rms_norm_rules_differ_only_near_zero():
    one = jnp.ones(8)
    small = jnp.full((1, 8), 1e-4)
    np.testing.assert_allclose(rms_norm(small, one, eps=1e-6, eps_rule="clamp"), small / 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rms_norm(small, one, eps=1e-6), small / np.sqrt(1e-8 + 1e-6), rtol=1e-5)
    with pytest.raises(ValueError, match="'add' or 'clamp'"):
        rms_norm(small, one, eps=1e-6, eps_rule="none")

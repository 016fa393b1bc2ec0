"""Is orthogonalisation the published one? Against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.update_rules import newton_schulz as plain

from stellarbyte_jax.ops import newton_schulz as op

COEFFICIENTS = jnp.asarray((3.4445, -4.7750, 2.0315))


@pytest.mark.parametrize("most", [op._AT_ONCE, 100, 1], ids=["at once", "some at a time", "one at a time"])
@pytest.mark.parametrize("shape", [(6, 5, 7), (5, 9, 8), (1, 1, 4)], ids=str)
def test_each_matrix_is_made_orthogonal(shape, most, monkeypatch):
    monkeypatch.setattr(op, "_AT_ONCE", most)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    program = jax.jit(lambda x: op.newton_schulz(x, COEFFICIENTS, 1e-3))
    expected = np.stack([plain(np.float64(matrix), 1e-3) for matrix in x])
    np.testing.assert_allclose(program(x), expected, atol=1e-5)
    count = op.at_once(*shape)
    assert count == {op._AT_ONCE: shape[0], 100: {6: 2, 5: 1, 1: 1}[shape[0]], 1: 1}[most]
    assert ("while" in program.lower(x).as_text()) == (count < shape[0])


def test_zeros_stay():
    """Devices get matrices of zeros where there are too few."""
    assert not np.any(op.newton_schulz(jnp.zeros((2, 3, 4)), COEFFICIENTS, 1e-8))

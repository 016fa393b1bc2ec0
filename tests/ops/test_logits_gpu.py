"""The head's loss by a kernel on a Hopper GPU."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.heads import HEADS, assert_near, head, of_loss
from helpers.hopper import hopper_gpu  # noqa: F401 (a fixture)

from stellarbyte_jax.ops.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case", [*HEADS.values(), {"tokens": 5000, "inputs": 1024, "columns": 32000}, {"columns": 4096, "words": 4000}]
)
def test_the_loss_and_its_gradients(case):
    given, options = head(**case)
    exact = of_loss(linear_cross_entropy, jnp.float32, given, options)
    rounded = of_loss(linear_cross_entropy, jnp.bfloat16, given, options)
    found = of_loss(linear_cross_entropy, jnp.bfloat16, given, options, implementation="pallas")
    assert_near(found, rounded, exact)
    again = of_loss(linear_cross_entropy, jnp.bfloat16, given, options, implementation="pallas")
    for ours, before in zip(again, found, strict=True):
        np.testing.assert_array_equal(ours, before)

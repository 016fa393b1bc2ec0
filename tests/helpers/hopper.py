"""For tests of kernels on a GPU: skipped where it is no Hopper GPU."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def hopper_gpu():
    if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
        pytest.skip("needs a Hopper GPU")

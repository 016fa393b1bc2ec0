"""The experts' path for kernels without a GPU: XLA computes its products."""

import pytest

from stellarbyte_jax.model import experts
from stellarbyte_jax.ops import grouped_matmul


@pytest.fixture
def computed_by_xla(monkeypatch):
    monkeypatch.setattr(experts, "kernels_refusal", lambda x, w: None)
    for products in ("_PRODUCTS", "_GRADIENTS_OF_ROWS", "_GRADIENTS_OF_MATRICES"):
        by_name = getattr(grouped_matmul, products)
        monkeypatch.setitem(by_name, "pallas", by_name["xla"])

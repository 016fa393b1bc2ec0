"""What our sides of measurements of single operations share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def repeated(run: Callable[..., Any], *arrays: Any) -> Callable[[int], None]:
    """A function of a number of calls, which returns when all are done."""

    def calls(count: int) -> None:
        made: Any = None
        for _ in range(count):
            made = run(*arrays)
        jax.block_until_ready(made)

    return calls


def apart(ours: Array, others: Array) -> float:
    """How far two results are apart, over the norm of the second."""
    ours, others = ours.astype(jnp.float32), others.astype(jnp.float32)
    return float(jnp.linalg.norm(ours - others) / jnp.linalg.norm(others))

"""Our side of ``benchmark cross_entropy``. X tokens, D model, V vocabulary."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stellarbyte_jax.cli.layer_speed import timed
from stellarbyte_jax.cli.loss_speed import Case, Result, figures
from stellarbyte_jax.cli.ours import apart, repeated
from stellarbyte_jax.launch import environment
from stellarbyte_jax.ops.cross_entropy import linear_cross_entropy

_WRONG = 0.01  # of the norm of a gradient, from one size of chunks to another: rounding makes a tenth of it


def measure_case(case: Case, chunks: Sequence[int], calls: int) -> Result:
    """The loss and its gradients by XLA and by the kernel, by the number of tokens whose logits exist at a time.

    Args:
      case: what is computed.
      chunks: tokens of a chunk.
      calls: of a repeat.
    """
    x_XD = jax.random.normal(jax.random.key(0), (case.tokens, case.hidden), jnp.bfloat16)
    kernel_DV = 0.02 * jax.random.normal(jax.random.key(1), (case.hidden, case.vocabulary), jnp.bfloat16)
    targets_X = jax.random.randint(jax.random.key(2), (case.tokens,), 0, case.vocabulary)
    found: Result = {}
    first: list[Array] = []
    ways = [(chunk, implementation) for implementation in ("xla", "pallas") for chunk in dict.fromkeys(chunks)]
    for chunk, implementation in ways:
        name = f"{implementation}_chunks_of_{chunk}"
        try:
            run_once = partial(_gradients, chunk=chunk, implementation=implementation)
            program = jax.jit(run_once).lower(x_XD, kernel_DV, targets_X).compile()
            made = jax.block_until_ready(program(x_XD, kernel_DV, targets_X))
            seconds = timed(repeated(program, x_XD, kernel_DV, targets_X), calls)
        except (NotImplementedError, RuntimeError) as error:  # the second of JAX
            found[name] = {"refused": str(error).splitlines()[0][:200]}
            continue
        memory = program.memory_analysis()
        extra = 0 if memory is None else memory.temp_size_in_bytes
        found[name] = figures(case, seconds, extra, jax.devices()[0].device_kind)
        first = first or made
        most = max(apart(ours, others) for ours, others in zip(made, first, strict=True))
        if not most < _WRONG:
            found["error"] = f"{name}: gradients are {most:.2g} of their norm apart, where {_WRONG} is the limit"
    return {**found, "on": environment()}


def _gradients(x_XD: Array, kernel_DV: Array, targets_X: Array, *, chunk: int, implementation: str) -> list[Array]:
    def loss(x_XD: Array, kernel_DV: Array) -> Array:
        how: dict[str, Any] = dict(chunk_size=chunk, implementation=implementation)
        return linear_cross_entropy(x_XD, kernel_DV, targets_X, **how)[0] / targets_X.size

    value, gradients = jax.value_and_grad(loss, (0, 1))(x_XD, kernel_DV)
    return [value, *gradients]

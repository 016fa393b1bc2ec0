"""A sum of parts whose number the device alone knows: those that there are take time, and one at a time memory."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# (number of the part, what is differentiated, the rest) -> what the part adds
Part = Callable[[Any, Any, Any], Array]


def sum_of_parts(part: Part, count: Int[Array, ""], inputs: Any, rest: Any) -> Array:
    """``part(0) + ... + part(count - 1)``.

    The first part is always computed, and keeps for the backward pass what it needs; the others, meant to be rare, are
    computed anew there.

    Args:
      part: a function without arrays of its own.
      count: int32 scalar, 1 or more.
      inputs: tree of arrays; the sum has a gradient with respect to them.
      rest: tree of arrays of whole numbers.
    """
    return cast(jax.Array, _summed(part, count, inputs, rest))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(part: Part, count: Array, inputs: Any, rest: Any) -> Array:
    return _added(part, count, inputs, rest, part(0, inputs, rest))


def _added(part: Part, count: Array, inputs: Any, rest: Any, first: Array) -> Array:
    return jax.lax.fori_loop(1, count, lambda number, total: total + part(number, inputs, rest), first)


def _forward(part: Part, count: Array, inputs: Any, rest: Any) -> tuple[Array, tuple[Any, ...]]:
    first, back = jax.vjp(lambda x: part(0, x, rest), inputs)
    return _added(part, count, inputs, rest, first), (back, count, inputs, rest)


def _backward(part: Part, kept: tuple[Any, ...], d: Array) -> tuple[None, Any, None]:
    back, count, inputs, rest = kept

    def add(number: Array, total: Any) -> Any:
        _, again = jax.vjp(lambda x: part(number, x, rest), inputs)
        return jax.tree.map(jnp.add, total, again(d)[0])

    return None, jax.lax.fori_loop(1, count, add, back(d)[0]), None


_summed.defvjp(_forward, _backward)

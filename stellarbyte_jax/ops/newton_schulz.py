"""Orthogonalisation of matrices by products alone.

N matrices, I rows, O columns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ROUNDS = 5
# Numbers of the matrices that are computed at once, 64 MiB in float32: enough for a GPU, and all that is held thrice.
_AT_ONCE = 2**24


def newton_schulz(x_NIO: Float[Array, "N I O"], coefficients: Float[Array, "3"], eps: float) -> Float[Array, "N I O"]:
    """Each matrix with singular values near 1 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    From ``X / (|X| + eps)`` by five rounds of ``a X + (b A + c A A) X`` with ``A = X X^T``, of the transpose where
    there are more rows than columns. Matrices of zeros stay so. Products are of the dtype of ``x_NIO``.
    """
    N, I, O = x_NIO.shape  # noqa: E741
    if I > O:
        return newton_schulz(x_NIO.swapaxes(1, 2), coefficients, eps).swapaxes(1, 2)
    a, b, c = coefficients.astype(x_NIO.dtype)

    def some(x: Array) -> Array:
        x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + eps
        for _ in range(ROUNDS):
            gram = x @ x.swapaxes(1, 2)
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    count = at_once(N, I, O)
    if count == N:
        return some(x_NIO)
    return jax.lax.map(some, x_NIO.reshape(N // count, count, I, O)).reshape(N, I, O)


def at_once(N: int, I: int, O: int) -> int:  # noqa: E741
    """How many of ``N`` matrices are computed at once."""
    most = max(1, _AT_ONCE // (I * O))
    return max(size for size in range(1, min(N, most) + 1) if N % size == 0)

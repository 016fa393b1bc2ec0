"""Muon on a mesh: the rule of optax, with the orthogonalisation spread over the devices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from stellarbyte_jax.model.params import WeightUse, kept_spec
from stellarbyte_jax.ops.newton_schulz import newton_schulz
from stellarbyte_jax.sharding import current_mesh
from stellarbyte_jax.sharding.matrices import Stack, each_matrix

_BETA = 0.95
_SIZE = 0.2  # root mean square of AdamW's usual updates (Liu et al. 2025)


def muon(uses: Any, *, eps: float, b1: float, b2: float) -> optax.GradientTransformation:
    """``optax.contrib.muon`` of learning rate 1 and ``consistent_rms=0.2``, with its state.

    That one gathers the matrices of all layers on every device; here each device has its share of them whole.

    Args:
      uses: of the weights, a tree of ``WeightUse``. Hidden matrices are orthogonalised, all others take AdamW with
        Nesterov momentum and no decay.
      eps: added to the norm of a matrix, and to the root of AdamW's second average.
      b1: decay of AdamW's first average.
      b2: of its second one.
    """
    labels = jax.tree.map(lambda use: "muon" if use.is_hidden_matrix else "adam", uses)
    hidden = [use for use in jax.tree.leaves(uses) if use.is_hidden_matrix]
    # The transformations that do nothing stand for optax's, whose state checkpoints hold.
    matrices = optax.chain(_orthogonalised(hidden, eps), optax.identity(), optax.identity(), optax.scale(-1.0))
    others = optax.adamw(1.0, b1, b2, eps, weight_decay=0.0, nesterov=True)
    return optax.partition({"muon": matrices, "adam": others}, labels)


def stack_of(use: WeightUse, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None) -> Stack:
    """The matrices of a weight, kept as ``placement.placed`` keeps it."""
    spec = PartitionSpec() if mesh is None else kept_spec(use, shape, mesh)
    return Stack(shape, use.contracted, use.output, spec)


def _orthogonalised(hidden: list[WeightUse], eps: float) -> optax.GradientTransformation:
    """Nesterov momentum of matrices, made orthogonal and of AdamW's size; ``hidden`` are the uses of these in order."""
    plain = optax.contrib.scale_by_muon(beta=_BETA)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, _BETA, 1)
        momentum = jax.tree.map(
            lambda m, g: _BETA * m + (1 - _BETA) * g,
            optax.tree.bias_correction(mu, _BETA, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, _BETA, count),
        )
        leaves, structure = jax.tree.flatten(momentum)
        mesh = current_mesh()
        stacks = [stack_of(use, x.shape, mesh) for use, x in zip(hidden, leaves, strict=True)]

        def sized(x: jax.Array) -> jax.Array:
            return _SIZE * jnp.sqrt(max(x.shape[1:])) * newton_schulz(x, state.ns_coeffs, eps)

        made = each_matrix(sized, leaves, stacks)
        return jax.tree.unflatten(structure, made), optax.contrib.MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(plain.init, update)

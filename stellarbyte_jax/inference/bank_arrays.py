"""Arrays of a bank's adapters: all of the same shapes, and what compiled programs make of them.

R is the rank that adapters are padded to.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.checkpoint.adapters import Adapters
from stellarbyte_jax.hf.tensors import flatten, put_leaf
from stellarbyte_jax.inference.bank_checks import check_shapes
from stellarbyte_jax.lora import merged, shares, split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses
from stellarbyte_jax.model.lora import MAGNITUDE, RANK, SCALE, SHARE, A, B
from stellarbyte_jax.model.params import WeightUse, kept_spec
from stellarbyte_jax.model.placement import weight_places
from stellarbyte_jax.model.trees import Params, Shapes, Uses, merge, partition
from stellarbyte_jax.sharding import current_mesh, device_mesh, split_array


@dataclass(frozen=True)
class Form:
    """What the arrays of each adapter of a bank are.

    A, and B with the adapter's factor in it, of each weight that adapters may be of; with DoRA what outputs are
    multiplied by.

    Attributes:
      network: with adapters of rank R whose factor is 1.
    """

    network: ByteTransformer

    @property
    def uses(self) -> Uses:
        """The uses of all weights, and of the arrays."""
        return _with_shares(param_uses(self.network))

    @property
    def shapes(self) -> Shapes:
        """Shapes of the arrays, and of the factors of the network."""
        return _with_shares(split(param_shapes(self.network))[0])

    def empty(self) -> Params:
        """No adapter, arrays of numpy: zeros, and outputs times 1. Of the compute dtype, but for what is float32."""
        dtype, of = jnp.dtype(self.network.config.compute_dtype), flatten(self.uses)

        def array(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            return np.full(leaf.shape, float(path.endswith(SHARE)), jnp.float32 if of[path].float32 else dtype)

        leaves = flatten(self.shapes).items()
        return _tree({path: array(path, leaf) for path, leaf in leaves if not path.endswith(SCALE)})

    def factors(self) -> Params:
        """The factors of the network, float32 arrays of numpy."""
        leaves = flatten(self.shapes).items()
        return _tree({path: np.ones(x.shape, np.float32) for path, x in leaves if path.endswith(SCALE)})

    def placed(self, arrays: Params) -> Params:
        """Arrays on the device, or on the mesh that is set, as those of a run lie there."""
        mesh = device_mesh()
        if mesh is None:
            return jax.tree.map(jnp.asarray, arrays)
        return jax.tree.map(split_array, arrays, _part(_with_shares(weight_places(self.network, mesh)), arrays))


def padded(name: str, adapters: Adapters, form: Form) -> tuple[Params, Params]:
    """The arrays of an adapter, of numpy, and its magnitudes, which are NaN where it has none.

    Args:
      name: of the adapter, for messages.
      adapters: of settings that the bank can hold.
      form: of the bank.

    Raises:
      ValueError: shapes are those of another base.
    """
    given = {
        path: np.asarray(x) for path, x in flatten(adapters.params).items() if path.endswith((A, B, MAGNITUDE, SCALE))
    }
    arrays = flatten(form.empty())
    magnitudes = {p: np.full(x.shape, np.nan, np.float32) for p, x in arrays.items() if p.endswith(SHARE)}
    factors = {path: x.astype(np.float32) for path, x in given.items() if path.endswith((A, B))}
    check_shapes(name, factors, arrays, flatten(form.uses), adapters.model.config.lora.r)
    for path, x in factors.items():
        if path.endswith(B):
            x = x * _widened(given[path.removesuffix(B) + SCALE], x)
        arrays[path][tuple(map(slice, x.shape))] = x.astype(arrays[path].dtype)
    for path, x in given.items():
        if path.endswith(MAGNITUDE):
            has = _widened(given[path.removesuffix(MAGNITUDE) + SCALE], x) > 0
            magnitudes[path.removesuffix(MAGNITUDE) + SHARE] = np.where(has, x, np.float32(np.nan))
    return _tree(arrays), _tree(magnitudes)


def _widened(scale: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The factor of each layer, for arrays of all layers."""
    return scale.reshape(scale.shape + (1,) * (like.ndim - scale.ndim)).astype(np.float32)


@partial(jax.jit, static_argnames="form")
def with_shares(form: Form, weights: Params, arrays: Params, magnitudes: Params, factors: Params) -> Params:
    """The arrays of an adapter with DoRA, from those without it.

    Args:
      form: of the bank.
      weights: those that have adapters.
      arrays: of the adapter.
      magnitudes: likewise.
      factors: of the network.
    """
    renamed = {f"{path.removesuffix(SHARE)}{MAGNITUDE}": x for path, x in flatten(magnitudes).items()}
    rest = partition(arrays, lambda path: not path[-1].endswith(SHARE))[0]
    found = shares(weights, merge(merge(rest, _tree(renamed)), factors), param_uses(form.network))
    return merge(rest, _kept(form, found))


@partial(jax.jit, static_argnames="form")
def merge_into(form: Form, weights: Params, adapters: Params) -> Params:
    """Weights with an adapter in them, each in its dtype; of those that have adapters."""
    whole = merged(weights, adapters, param_uses(form.network))
    return _kept(form, jax.tree.map(lambda x, like: x.astype(like.dtype), whole, weights))


@partial(jax.jit, static_argnames="form")
def joined(form: Form, first: Params, second: Params, rank: jax.Array, weight: jax.Array) -> Params:
    """The sum of two adapters: inner channels of the second, times a weight, come behind ``rank`` ones of the first."""
    uses, others = flatten(form.uses), flatten(second)

    def join(path: str, x: jax.Array) -> jax.Array:
        if path.endswith(SHARE):
            return x
        y = others[path].astype(jnp.float32) * weight if path.endswith(B) else others[path]
        return x + jnp.roll(y, rank, axis=uses[path].axes.index(RANK)).astype(x.dtype)

    return _kept(form, _tree({path: join(path, x) for path, x in flatten(first).items()}))


@partial(jax.jit, static_argnames="form")
def by_row(form: Form, rows: tuple[Params, ...]) -> Params:
    """Adapters of rows with an axis of rows, behind that of layers."""
    mesh = current_mesh()

    def stack(use: WeightUse, *each: jax.Array) -> jax.Array:
        at = int(use.axes[:1] == ("layers",))
        whole = jnp.stack(each, axis=at)
        if mesh is None:
            return whole
        use = dataclasses.replace(use, axes=(*use.axes[:at], "batch", *use.axes[at:]))
        return jax.lax.with_sharding_constraint(whole, kept_spec(use, whole.shape, mesh))

    return jax.tree.map(stack, _part(form.uses, rows[0]), *rows)


def _kept(form: Form, made: Params) -> Params:
    """Arrays as they are kept on the mesh that is set."""
    mesh = current_mesh()
    if mesh is None:
        return made
    return jax.tree.map(
        lambda use, x: jax.lax.with_sharding_constraint(x, kept_spec(use, x.shape, mesh)), _part(form.uses, made), made
    )


def _with_shares(tree: Params) -> Params:
    """What is said of magnitudes, by the names of what outputs are multiplied by."""
    return {
        name.removesuffix(MAGNITUDE) + SHARE if name.endswith(MAGNITUDE) else name: _with_shares(value)
        if isinstance(value, dict)
        else value
        for name, value in tree.items()
    }


def _part(tree: Params, like: Params) -> Params:
    """What a tree says of the leaves of another one."""
    return {name: _part(tree[name], value) if isinstance(value, dict) else tree[name] for name, value in like.items()}


def _tree(leaves: dict[str, Any]) -> Params:
    made: Params = {}
    for path, leaf in leaves.items():
        put_leaf(made, path, leaf)
    return made

"""Adapters as parts of parameter trees: added to weights, merged into them, taken out again."""

import string
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.model.decoder import ByteTransformer, init_params, param_uses, trained, weights_alone
from stellarbyte_jax.model.lora import MAGNITUDE, RANK, SCALE, SHARE, A, B, is_adapter, share_of
from stellarbyte_jax.model.params import WeightUse
from stellarbyte_jax.model.placement import weight_places
from stellarbyte_jax.model.trees import IsTrainable, Params, Uses, all_trainable, merge, partition
from stellarbyte_jax.sharding import device_mesh


def split(params: Params) -> tuple[Params, Params]:
    """A tree as two: adapters, and the base without them. Nothing is copied."""
    return partition(params, is_adapter)


def kept_elsewhere(model: ByteTransformer) -> IsTrainable:
    """Which weights of a network with adapters its checkpoints do not hold: those that are frozen, of the base."""
    if not model.config.lora.r:
        return lambda path: False
    is_weight, is_trained = weights_alone(model), trained(model)
    return lambda path: is_weight(path) and not is_trained(path)


def as_base(model: ByteTransformer, params: Params) -> Params:
    """Frozen weights in ``lora.base_dtype``: matrices and tables, but for what is used in float32.

    Others, such as norms and biases, are few numbers.

    Args:
      model: the network with adapters.
      params: a tree with some of its weights.
    """
    dtype = jnp.dtype(model.config.lora.base_dtype)

    def visit(tree: Params, uses: Uses) -> Params:
        made: Params = {}
        for name, value in tree.items():
            use: Any = uses[name]
            if isinstance(value, dict):
                made[name] = visit(value, use)
            else:
                made[name] = value.astype(dtype) if (use.is_matrix or use.lookup) and not use.float32 else value
        return made

    return visit(params, param_uses(model)) if model.config.lora.r else params


def with_adapters(model: ByteTransformer, base: Params, key: Array) -> Params:
    """The weights of a base, in ``lora.base_dtype``, with fresh adapters, which change nothing yet.

    ``B`` is zero (of a table ``A``), and DoRA's magnitudes are the lengths of the weights.

    Args:
      model: the network with adapters, ``config.lora.r`` > 0.
      base: weights without adapters.
      key: of what is random.
    """
    base = as_base(model, base)
    # Compiled, what initialises the base is no part of the program.
    places = _places(model, is_adapter)
    fresh = jax.jit(lambda key: split(init_params(model, key))[0], out_shardings=places)(key)
    if model.config.lora.dora:
        uses = param_uses(model)
        fresh = jax.jit(lambda fresh, base: _with_lengths(fresh, base, uses), out_shardings=places)(fresh, base)
    return merge(fresh, base)


def _places(model: ByteTransformer, is_wanted: IsTrainable = all_trainable) -> Any:
    """Where weights of a network lie on the mesh that is set, as ``jax.jit`` takes it; None without one."""
    mesh = device_mesh()
    return None if mesh is None else partition(weight_places(model, mesh), is_wanted)[0]


def _with_lengths(adapters: Params, base: Params, uses: Uses) -> Params:
    """DoRA's magnitudes as the lengths of the weights."""
    made: Params = {}
    for name, value in adapters.items():
        if isinstance(value, dict):
            made[name] = _with_lengths(value, base[name], uses[name])
        elif name.endswith(MAGNITUDE):
            of = name.removesuffix(MAGNITUDE)
            made[name] = _lengths(base[of].astype(jnp.float32), uses[of])
        else:
            made[name] = value
    return made


def _lengths(matrix: Array, use: WeightUse) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=use.contracted))


def merge_adapters(model: ByteTransformer, params: Params) -> tuple[ByteTransformer, Params]:
    """The same function without adapters, in float32: weights that had one have it in them.

    Raises:
      ValueError: adapters are not linear.
    """
    config = model.config.lora
    if not config.r:
        return model, params
    if config.activation != "none":
        raise ValueError(
            f"adapters with lora.activation={config.activation} are no part of a matrix and cannot be merged: use them "
            "in the run that they belong to, or train adapters with lora.activation=none"
        )
    adapters, base = split(params)
    uses, plain = param_uses(model), ByteTransformer(model.config.without_adapters)
    merge_all = jax.jit(lambda adapters, base: merged(base, adapters, uses), out_shardings=_places(plain))
    return plain, merge_all(adapters, base)


def merged(base: Params, adapters: Params, uses: Uses) -> Params:
    """Weights in float32, those that have a linear adapter with it in them; ``uses`` are those of all."""
    made: Params = {}
    for name, value in base.items():
        if isinstance(value, dict):
            made[name] = merged(value, adapters.get(name, {}), uses[name])
        elif name + SCALE in adapters:
            made[name] = _with_delta(name, value, adapters, uses)
        else:
            made[name] = value.astype(jnp.float32)
    return made


def _with_delta(name: str, value: Array, adapters: Params, uses: Uses) -> Array:
    """``W + scale A B``, and with DoRA its direction times the magnitude, in float32."""
    whole = _sum(name, value, adapters, uses)
    if name + SHARE in adapters:
        return whole * jnp.expand_dims(adapters[name + SHARE], uses[name].contracted)
    magnitude = adapters.get(name + MAGNITUDE)
    if magnitude is None:
        return whole
    scale = adapters[name + SCALE]
    has_adapter = (scale > 0).reshape(scale.shape + (1,) * (magnitude.ndim - scale.ndim))
    share = jnp.where(has_adapter, share_of(magnitude, _lengths(whole, uses[name])), 1.0)
    return whole * jnp.expand_dims(share, uses[name].contracted)


def shares(base: Params, adapters: Params, uses: Uses) -> Params:
    """What DoRA multiplies outputs by: magnitudes by lengths of the weights with adapters, 1 where these are NaN."""
    made: Params = {}
    for name, value in base.items():
        if isinstance(value, dict):
            made[name] = shares(value, adapters[name], uses[name])
        else:
            magnitude, length = adapters[name + MAGNITUDE], _lengths(_sum(name, value, adapters, uses), uses[name])
            made[name + SHARE] = jnp.where(jnp.isnan(magnitude), 1.0, share_of(magnitude, length))
    return made


def _sum(name: str, value: Array, adapters: Params, uses: Uses) -> Array:
    letters: dict[str, str] = {}

    def of(part: str) -> str:
        return "".join(letters.setdefault(axis, string.ascii_letters[len(letters)]) for axis in uses[part].axes)

    parts = (name + A, name + B, name + SCALE)
    spec = f"{','.join(map(of, parts))}->{of(name)}"
    return value.astype(jnp.float32) + jnp.einsum(
        spec, *(adapters[part].astype(jnp.float32) for part in parts), precision=jax.lax.Precision.HIGHEST
    )


class _Change(NamedTuple):
    """What an adapter adds to a weight, squared and summed.

    Attributes:
      total: float32 scalar.
      size: numbers of the weight.
    """

    total: Array
    size: int


def mean_square_change(model: ByteTransformer, params: Params) -> Float[Array, ""]:
    """The mean over all weights with adapters of ``(scale A B)^2``, float32: without the products themselves."""
    changes = list(_changes(params, param_uses(model)))
    return sum((change.total for change in changes), jnp.zeros(())) / sum(change.size for change in changes)


def _changes(tree: Params, uses: Uses) -> Iterator[_Change]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _changes(value, uses[name])
        elif name.endswith(A):
            of = name.removesuffix(A)
            # |A B|^2 is the sum of the products of A^T A and B B^T, which are [R, R].
            squares = [_inner_products(tree[part].astype(jnp.float32), uses[part]) for part in (name, of + B)]
            scale = tree[of + SCALE]
            scale = scale.reshape(scale.shape + (1,) * (squares[0].ndim - scale.ndim))
            yield _Change(jnp.sum(scale**2 * squares[0] * squares[1]), tree[of].size)


def _inner_products(x: Array, use: WeightUse) -> Array:
    """[batch, R, R], of the rows or columns of a factor."""
    letters = string.ascii_lowercase[: x.ndim]
    rank = use.axes.index(RANK)
    other = letters.replace(letters[rank], "z")
    batch = "".join(letters[n] for n in use.batch)
    return jnp.einsum(f"{letters},{other}->{batch}{letters[rank]}z", x, x)

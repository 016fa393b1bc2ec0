"""Products of activations with weights: the only place where weights are contracted, adapters included."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.model.lora import Adapter, Factors, LowRank, adapter_of
from stellarbyte_jax.model.params import letters_of, materialise, param, product
from stellarbyte_jax.sharding import gather


def kernel(
    module: nn.Module,
    name: str,
    spec: str,
    dtype: jnp.dtype,
    init: nn.initializers.Initializer,
    *,
    batch: tuple[str, ...] = (),
    float32: bool = False,
    **axes: int,
) -> Array:
    """The matrix that :func:`linear` would use, in ``dtype``: for operations that do the product themselves.

    On a mesh it is gathered along the axes that weights are only kept in parts along.
    """
    stored, adapter = _fetched(module, name, spec, init, batch, float32, axes)
    matrix = materialise(stored, dtype)
    return gather(matrix if adapter is None else adapter.merged(matrix), tuple(axes))


def factors(
    module: nn.Module,
    name: str,
    spec: str,
    dtype: jnp.dtype,
    init: nn.initializers.Initializer,
    *,
    batch: tuple[str, ...] = (),
    **axes: int,
) -> tuple[Factors, Factors]:
    """The matrix and its adapter, in ``dtype`` and as they are kept on a mesh, and the axes of each array of these."""
    stored, adapter = _fetched(module, name, spec, init, batch, False, axes)
    matrix = materialise(stored, dtype)
    if adapter is None:
        return Factors(matrix), Factors(tuple(axes))
    return adapter.factors(matrix), adapter.factor_axes(tuple(axes))


def low_rank_factors(
    module: nn.Module, name: str, spec: str, x: Float[Array, "..."], init: nn.initializers.Initializer, **axes: int
) -> tuple[Array, LowRank | None]:
    """The matrix that :func:`linear` would use, and what its adapter adds to the product; None: nothing.

    With DoRA the adapter is in the matrix.
    """
    stored, adapter = _fetched(module, name, spec, init, (), False, axes)
    matrix = materialise(stored, x.dtype)
    if adapter is not None and adapter.magnitude is not None:
        return gather(adapter.merged(matrix), tuple(axes)), None
    return gather(matrix, tuple(axes)), None if adapter is None else adapter.low_rank(x)


def _fetched(
    module: nn.Module,
    name: str,
    spec: str,
    init: nn.initializers.Initializer,
    batch: tuple[str, ...],
    float32: bool,
    axes: Mapping[str, int],
) -> tuple[Array, Adapter | None]:
    """A matrix as it is stored, and its adapter."""
    contracted = letters_of(name, spec, axes).contracted
    stored = param(module, name, init, axes, contracted=contracted, batch=batch, float32=float32)
    return stored, adapter_of(module, name, spec, stored, batch, float32, axes)


def linear(
    module: nn.Module,
    name: str,
    spec: str,
    x: Float[Array, "..."],
    init: nn.initializers.Initializer,
    *,
    bias: bool = False,
    batch: tuple[str, ...] = (),
    out_dtype: jnp.dtype | None = None,
    float32: bool = False,
    float8: bool = False,
    **axes: int,
) -> Float[Array, "..."]:
    """The product of activations with a weight, and a bias where asked for.

    ``linear(self, "q", "BTD,DNH->BTNH", x_BTD, init, embed=D, heads=N, head_dim=H)``

    Args:
      module: whose weight it is.
      name: of the weight; its bias is ``{name}_bias``.
      spec: einsum of the activations and the weight. Letters of the weight that the result lacks are contracted.
      x: activations; the product is in their dtype, summed in float32.
      init: initializer of the weight. A bias begins with zeros.
      bias: whether to add one.
      batch: axes of the weight that index independent matrices.
      out_dtype: of the result, where it is not that of ``x``.
      float32: whether the product is one of float32, whatever the dtype of ``x``, without reduced precision.
      float8: whether what is multiplied, here and for the gradients, has 8 bits. An adapter's product has those of x.
      **axes: name and size of each axis of the weight, in order.

    Raises:
      ValueError: the spec does not fit the axes, or an axis is none of ``sharding.WEIGHT_AXES``.
    """
    letters, output, _ = letters_of(name, spec, axes)
    dtype = jnp.dtype(jnp.float32) if float32 else x.dtype
    stored, adapter = _fetched(module, name, spec, init, batch, float32, axes)
    matrix = gather(materialise(stored, dtype), tuple(axes))
    names = dict(zip(letters, axes, strict=True))
    result = product(spec, x, matrix, names, out_dtype, jax.lax.Precision.HIGHEST if float32 else None, float8)
    if adapter is not None:
        result = adapter.added(result, x.astype(dtype))
    if bias:
        sizes = {names[letter]: axes[names[letter]] for letter in letters if letter in output}
        offset = materialise(param(module, f"{name}_bias", nn.initializers.zeros, sizes), result.dtype)
        shape = [axes[names[letter]] if letter in names else 1 for letter in output]
        result += offset.reshape([1] * (result.ndim - len(output)) + shape)
    return result

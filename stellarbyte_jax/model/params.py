"""A weight and its use: the only place where weights are made, fetched, cast and sharded.

What a weight is used for is stated where it is made and travels with it: see :class:`WeightUse`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from stellarbyte_jax.model.trees import Params, Uses
from stellarbyte_jax.ops.float8_product import float8_product
from stellarbyte_jax.ops.float32_product import float32_product
from stellarbyte_jax.sharding import WEIGHT_AXES, constrain, enter, kept_spec_of, spec_of, stream_axes

FEW_ROWS = 128  # multiplied as they are: parts need several programs


@dataclass(frozen=True)
class WeightUse:
    """What the axes of a weight are, for sharding and for optimizers. Nothing is inferred by exclusion.

    Attributes:
      axes: logical axis of each dimension, see ``sharding.Rules``.
      contracted: dimensions that a product sums over. A weight that has any is a matrix (one for each index of the
        batch dimensions), from these dimensions to the ``output`` ones.
      batch: dimensions that index independent matrices.
      lookup: whether the weight is a table whose rows are looked up.
      float32: whether it is used in float32 whatever the compute dtype.
      tracked: whether it is no weight that gradients reach but a number that training keeps beside them, such as how
        much an expert is used. It goes wherever weights go.
    """

    axes: tuple[str, ...]
    contracted: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    lookup: bool = False
    float32: bool = False
    tracked: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether a product contracts it."""
        return bool(self.contracted)

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix from activations to activations: no table, no head and no router."""
        return self.is_matrix and not {"vocab", "routed", "gate_inside"} & set(self.axes)

    @property
    def output(self) -> tuple[int, ...]:
        """Dimensions of a matrix's results."""
        return tuple(i for i in range(len(self.axes)) if i not in (*self.contracted, *self.batch))

    def stacked(self, axis: str) -> "WeightUse":
        """The use of several such weights stacked on a new first axis."""
        contracted, batch = (tuple(i + 1 for i in dims) for dims in (self.contracted, self.batch))
        return replace(self, axes=(axis, *self.axes), contracted=contracted, batch=(0, *batch))


def kept_spec(use: WeightUse, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a weight is kept on a mesh. Vectors, which are few numbers, are kept as they are used."""
    return (kept_spec_of if use.is_matrix or use.lookup else spec_of)(use.axes, shape, mesh)


@struct.dataclass
class Weight(nn.meta.AxisMetadata):
    """A weight with its use, as it comes out of ``init``."""

    value: Array
    use: WeightUse = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        """The array alone."""
        return self.value

    def replace_boxed(self, val: object) -> Self:
        """Another value of the same use."""
        return self.replace(value=val)  # type: ignore[attr-defined]

    def add_axis(self, index: int, params: dict[str, str]) -> Self:
        """After a scan stacked the weight."""
        assert index == 0
        return self.replace(use=self.use.stacked(params[nn.PARTITION_NAME]))  # type: ignore[attr-defined]

    def remove_axis(self, index: int, params: dict[str, str]) -> Self:
        """Inside of the scan that stacks it."""
        assert index == 0 and params[nn.PARTITION_NAME] == self.use.axes[0]
        contracted, batch = (tuple(i - 1 for i in dims if i > 0) for dims in (self.use.contracted, self.use.batch))
        return self.replace(  # type: ignore[attr-defined]
            use=replace(self.use, axes=self.use.axes[1:], contracted=contracted, batch=batch)
        )


def param(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    axes: Mapping[str, int],
    *,
    contracted: tuple[str, ...] = (),
    batch: tuple[str, ...] = (),
    lookup: bool = False,
    float32: bool = False,
    tracked: bool = False,
    by_row: bool = False,
) -> Array:
    """Makes or fetches a weight, as it is stored: :func:`materialise` makes an array of a dtype of it.

    Args:
      module: whose weight it is.
      name: of the weight.
      init: its initializer.
      axes: name and size of each axis, in order.
      contracted: axes that products sum over; see :class:`WeightUse`, as for the next ones.
      batch: axes that index independent matrices.
      lookup: whether rows are looked up.
      float32: whether it is used in float32.
      tracked: whether it is a number that training keeps.
      by_row: whether a given weight may have an axis of rows before the others: one of its own for each row of a batch.

    Raises:
      ValueError: an axis is none of ``sharding.WEIGHT_AXES``, or the given weight has another shape.
    """
    unknown = [axis for axis in axes if axis not in WEIGHT_AXES]
    if unknown:
        raise ValueError(f"weight {name}: unknown axes {unknown}; known are {', '.join(WEIGHT_AXES)}")
    names = tuple(axes)
    use = WeightUse(
        names,
        tuple(names.index(a) for a in contracted),
        tuple(names.index(a) for a in batch),
        lookup,
        float32,
        tracked,
    )
    shape = tuple(axes.values())
    if module.is_initializing() or not module.has_variable("params", name):
        return jnp.asarray(module.param(name, _first, init, shape, use))
    # Module.param would trace the initializer for its shape: nearly half of the time that tracing a network takes.
    made = jnp.asarray(nn.meta.unbox(module.get_variable("params", name)))  # numpy arrays are weights too
    if made.shape != shape and not (by_row and made.shape[1:] == shape):
        asked = ", ".join(f"{axis} {size}" for axis, size in axes.items())
        raise ValueError(
            f"weight {name} has shape {made.shape}, the config asks for {shape} ({asked}): give its weights"
        )
    return made


def _first(key: Array, init: nn.initializers.Initializer, shape: tuple[int, ...], use: WeightUse) -> Weight:
    return Weight(init(key, shape, jnp.float32), use)


def materialise(stored: Array, dtype: jnp.dtype | str) -> Array:
    """A stored weight, or rows of it, in the dtype of a computation. Nothing else knows how weights are stored."""
    return stored.astype(dtype)


def product(
    spec: str,
    x: Float[Array, "..."],
    matrix: Float[Array, "..."],
    names: Mapping[str, str],
    out_dtype: jnp.dtype | None = None,
    precision: jax.lax.Precision | None = None,
    float8: bool = False,
) -> Float[Array, "..."]:
    """An einsum of activations and a weight, split over the mesh by the weight's axes.

    Args:
      spec: of the einsum. ``B`` is the axis of rows, also of a weight that has one, ``T`` and ``S`` are axes of
        positions.
      x: activations.
      matrix: weight in their dtype; or in float32, with the highest precision.
      names: axis of each letter of the weight.
      out_dtype: of the result, where it is not that of ``x``.
      precision: of a float32 product; None: what jax is set to.
      float8: whether what is multiplied has 8 bits.
    """
    output, inputs = spec.partition("->")[2], spec.partition(",")[0]
    lengths = [x.shape[inputs.index(letter)] for letter in "TS" if letter in inputs]
    rows, positions = stream_axes(max(lengths, default=1))
    stream = {"B": rows, "T": positions, "S": positions}
    # What is computed with weights that are not split is split as the stream is.
    named = stream if "routed" in names.values() else {"B": "batch", "T": "sequence", "S": "sequence"}
    named |= {letter: "act_embed" if name == "embed" else name for letter, name in names.items()}
    x = enter(x, _axes(x, inputs, named), _axes(x, inputs, _between(inputs, named, stream)))
    by_parts = x.dtype == jnp.bfloat16 and matrix.dtype == jnp.float32 and precision == jax.lax.Precision.HIGHEST
    if by_parts and math.prod(x.shape[:-1]) > FEW_ROWS:
        assert matrix.ndim == 2 and spec == f"{inputs},{inputs[-1]}{output[-1]}->{inputs[:-1]}{output[-1]}"
        result = float32_product(x, matrix)
    elif float8:
        result = cast(Array, float8_product(spec, x, matrix))
    else:
        x = x.astype(matrix.dtype)
        letters = spec[len(inputs) + 1 :].partition("->")[0]
        summed = math.prod(size for letter, size in zip(letters, matrix.shape, strict=True) if letter not in output)
        # With one row XLA for a GPU multiplies and then adds, both in the dtype that is asked for here: in bfloat16 it
        # would round each product, and write all of them to memory.
        wide = jnp.float32 if x.size == summed and out_dtype is None else out_dtype
        result = jnp.einsum(spec, x, matrix, preferred_element_type=wide, precision=precision)
        result = result.astype(out_dtype or x.dtype)
    return constrain(result, _axes(result, output, _between(output, named, stream)))


def _axes(x: Array, letters: str, named: Mapping[str, str]) -> tuple[str | None, ...]:
    first, _, last = letters.partition("...")
    between = (None,) * (x.ndim - len(first + last))
    return (*map(named.get, first), *between, *map(named.get, last))


def _between(letters: str, named: Mapping[str, str], stream: Mapping[str, str]) -> Mapping[str, str]:
    """Names of axes, where rows and positions of what has the model's width are those of the stream between layers."""
    return {**named, **stream} if "act_embed" in (named.get(letter) for letter in letters) else named


class Letters(NamedTuple):
    """What an einsum says of a weight.

    Attributes:
      weight: a letter for each axis of the weight.
      output: letters of the result, without the ellipsis.
      contracted: names of the weight's axes that are summed over.
    """

    weight: str
    output: str
    contracted: tuple[str, ...]


def letters_of(name: str, spec: str, axes: Mapping[str, int]) -> Letters:
    """Reads an einsum of activations and a weight.

    Raises:
      ValueError: it does not fit the axes.
    """
    inputs, _, output = spec.partition("->")
    x, _, letters = inputs.partition(",")
    if len(letters) != len(axes):
        raise ValueError(f"weight {name}: {spec!r} gives it {len(letters)} axes, named are {', '.join(axes)}")
    alone = [letter for letter in letters if letter not in x + output]
    if alone:
        raise ValueError(f"weight {name}: {spec!r} sums over {', '.join(alone)}, which the activations do not have")
    output = output.replace(".", "")
    contracted = tuple(axis for axis, letter in zip(axes, letters, strict=True) if letter not in output)
    return Letters(letters, output, contracted)


def weight_uses(boxed: Params) -> Uses:
    """The :class:`WeightUse` of each weight, in a tree like the weights', from the result of ``init``."""
    return jax.tree.map(lambda box: box.use, boxed, is_leaf=lambda x: isinstance(x, Weight))

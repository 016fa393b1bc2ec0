"""Low-rank adapters of weights, in the products that use these.

R is the rank. An adapter of a weight ``w`` is two more weights beside it, ``w_lora_a`` with what the product contracts
and ``w_lora_b`` with what it gives, a factor ``w_lora_scale`` that is not trained, and with DoRA a magnitude
``w_lora_m``. The factor is 0 in layers that have no adapter: all layers of a stack have arrays of one shape.

In generation each row of a batch may have adapters of its own: A and B then have an axis of rows before the others. So
has ``w_lora_share``, which is there in place of a magnitude: what DoRA multiplies outputs by, computed before.
"""

import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig, LoRAConfig
from stellarbyte_jax.model.params import letters_of, materialise, param, product
from stellarbyte_jax.model.trees import Open
from stellarbyte_jax.sharding import gather

_FLOAT32 = jnp.dtype(jnp.float32)
RANK = "lora_rank"
A, B, MAGNITUDE, SCALE, SHARE = "_lora_a", "_lora_b", "_lora_m", "_lora_scale", "_lora_share"

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
# By the module and the weight, what settings call it.
_TARGETS = {
    **{("Attention", name): name for name in ("q", "k", "v", "o")},
    **{("MLP", name): name for name in ("gate_up", "down")},
    **{("Experts", name): "experts" for name in ("gate_up", "down")},
    **{("SharedExperts", name): "shared" for name in ("gate_up", "down")},
    ("Router", "kernel"): "router",
    ("Head", "kernel"): "head",
    ("Embed", "embedding"): "embed",
}


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether the weight at a path is part of an adapter."""
    return path[-1].endswith((A, B, MAGNITUDE, SCALE, SHARE))


def is_learnt(config: LoRAConfig, path: tuple[str, ...]) -> bool:
    """Whether a weight of a network with adapters is trained: those of adapters, and ``modules_to_save``."""
    if is_adapter(path):
        return not path[-1].endswith(SCALE)
    saved = {
        "embed": path[0] == "embed",
        "head": path[0] == "lm_head",
        "norms": any(name.endswith("norm") for name in path),
        "biases": path[-1].endswith("_bias"),
    }
    return any(saved[name] for name in config.modules_to_save)


def is_targeted(module: nn.Module, name: str) -> bool:
    """Whether a weight of a module has an adapter."""
    target = _TARGETS.get((type(module).__name__, name))
    return target is not None and target in _config(module).targets


def _config(module: nn.Module) -> LoRAConfig:
    return cast(ByteConfig, cast(Any, module).config).lora


class Factors(NamedTuple):
    """A matrix with its adapter, for operations that do the products themselves: ``x (W + a b)``, times ``share``.

    Attributes:
      matrix: ``W``.
      a: [batch, contracted, R]; None without an adapter, as the next two.
      b: [batch, R, output], with the adapter's factor in it.
      share: of DoRA, [batch, output] float32; None: it is none.
    """

    matrix: Open
    a: Open = None
    b: Open = None
    share: Open = None


class LowRank(NamedTuple):
    """What an adapter adds to a product of the last axes: ``h b``.

    Attributes:
      h: inner channels [..., R].
      b: [R, output].
    """

    h: Array
    b: Array


@dataclass(frozen=True)
class Adapter:
    """The adapter of a matrix, as it is stored.

    Attributes:
      module: whose weight it is.
      config: of all adapters.
      stored: the matrix.
      letters: of the matrix.
      into: einsum of what the product reads and ``a``.
      out: einsum of the inner channels and ``b``.
      a: [batch, contracted, R], or such an array for each row.
      b: [batch, R, output], likewise.
      scale: float32 scalar.
      magnitude: of DoRA [batch, output]; None: it is none.
      known_share: of DoRA in generation, float32 like the magnitude, or such an array for each row; None: it is to be
        computed, where there is a magnitude.
      names_a: axis of each letter of ``a``, without that of rows.
      names_b: likewise.
      contracted: dimensions of the matrix that are summed over.
      precision: of products.
    """

    module: nn.Module
    config: LoRAConfig
    stored: Array
    letters: str
    into: str
    out: str
    a: Array
    b: Array
    scale: Array
    magnitude: Array | None
    known_share: Array | None
    names_a: Mapping[str, str]
    names_b: Mapping[str, str]
    contracted: tuple[int, ...]
    precision: jax.lax.Precision | None

    def added(self, result: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product with the adapter, from that of the matrix alone; ``x`` is what it read."""
        low = self.low_rank(x)
        result = result + product(self.out, low.h, low.b, self.names_b, result.dtype, self.precision)
        share = self._share()
        if share is None:
            return result
        first, _, last = self.out.partition("->")[2].partition("...")
        rest = [letter for n, letter in enumerate(self.letters) if n not in self.contracted]
        rest = ["B", *rest] if share.ndim > len(rest) else rest
        order = [letter for letter in first + last if letter in rest]
        share = jnp.transpose(share, [rest.index(letter) for letter in order])
        sizes = dict(zip(order, share.shape, strict=True))
        sizes_of_first, sizes_of_last = ([sizes.get(letter, 1) for letter in part] for part in (first, last))
        between = [1] * (result.ndim - len(first + last))
        return result * share.reshape(*sizes_of_first, *between, *sizes_of_last).astype(result.dtype)

    def low_rank(self, x: Float[Array, "..."]) -> LowRank:
        """Inner channels of what the product reads, in its dtype, and the matrix behind them, without a magnitude."""
        if self.config.dropout and self.module.has_rng("dropout"):
            kept = 1 - self.config.dropout
            x = jnp.where(jax.random.bernoulli(self.module.make_rng("dropout"), kept, x.shape), x / kept, 0)
        a = _gathered(materialise(self.a, x.dtype), self.names_a.values())
        h = _ACTIVATIONS[self.config.activation](product(self.into, x, a, self.names_a, None, self.precision))
        return LowRank(h, _gathered(self._scaled_b(x.dtype), self.names_b.values()))

    def factors(self, matrix: Array) -> Factors:
        """With the matrix, in its dtype; all of it as it is kept on a mesh."""
        share = self._share()
        return Factors(matrix, materialise(self.a, matrix.dtype), self._scaled_b(matrix.dtype), share)

    def factor_axes(self, axes: tuple[str, ...]) -> Factors:
        """Axes of :meth:`factors`, with those of the matrix."""
        rest = tuple(axis for n, axis in enumerate(axes) if n not in self.contracted)
        share = None if self.magnitude is None and self.known_share is None else rest
        return Factors(axes, tuple(self.names_a.values()), tuple(self.names_b.values()), share)

    def merged(self, matrix: Array) -> Array:
        """The matrix with the adapter in it, in its dtype."""
        whole, share = matrix.astype(jnp.float32) + self._delta(), self._share()
        if share is not None:
            whole = whole * jnp.expand_dims(share, self.contracted)
        return whole.astype(matrix.dtype)

    def _scaled_b(self, dtype: jnp.dtype) -> Array:
        """Times the factor; of ``b``, which is the smallest of what could be multiplied."""
        return _scaled(self.b, self.scale, dtype)

    def _delta(self) -> Array:
        spec = f"{''.join(self.names_a)},{''.join(self.names_b)}->{self.letters}"
        return jnp.einsum(spec, materialise(self.a, _FLOAT32), self._scaled_b(_FLOAT32))

    def _share(self) -> Array | None:
        """What DoRA multiplies outputs by: the magnitude by the length of the weights, which has no gradient."""
        if self.magnitude is None:
            return self.known_share
        whole = jax.lax.stop_gradient(materialise(self.stored, _FLOAT32) + self._delta())
        length = jnp.sqrt(jnp.sum(jnp.square(whole), axis=self.contracted))
        # Where a layer has no adapter, the magnitude has no part in it either.
        return jnp.where(self.scale > 0, share_of(materialise(self.magnitude, _FLOAT32), length), 1.0)


def share_of(magnitude: Float[Array, "..."], length: Float[Array, "..."]) -> Float[Array, "..."]:
    """What DoRA multiplies an output by. Weights of length 0, such as the padding of a vocabulary, stay so."""
    return magnitude / jnp.where(length > 0, length, 1.0)


def adapter_of(
    module: nn.Module,
    name: str,
    spec: str,
    stored: Array,
    batch: tuple[str, ...],
    float32: bool,
    axes: Mapping[str, int],
) -> Adapter | None:
    """The adapter of a stored weight that is used by an einsum, see ``linear.linear``; None where it has none."""
    if not is_targeted(module, name):
        return None
    config = _config(module)
    letters, _, contracted = letters_of(name, spec, axes)
    x, _, result = spec.partition("->")
    x = x.partition(",")[0]
    rank = next(letter for letter in string.ascii_uppercase[::-1] if letter not in spec)
    by_axis = dict(zip(axes, letters, strict=True))
    outputs = [axis for axis in axes if axis not in (*batch, *contracted)]
    names_a = {by_axis[axis]: axis for axis in (*batch, *contracted)} | {rank: RANK}
    names_b = {by_axis[axis]: axis for axis in batch} | {rank: RANK} | {by_axis[axis]: axis for axis in outputs}
    summed = {by_axis[axis] for axis in contracted}
    new = "".join(by_axis[axis] for axis in batch if by_axis[axis] not in x)
    inner = "".join(letter for letter in x if letter not in summed) + new + rank
    sizes = {**axes, RANK: config.r}

    def weight(
        suffix: str, init: nn.initializers.Initializer, names: Mapping[str, str], summed: tuple[str, ...]
    ) -> Array:
        shape = {axis: sizes[axis] for axis in names.values()}
        return param(module, name + suffix, init, shape, contracted=summed, batch=batch, float32=float32, by_row=True)

    fan_in = math.prod(axes[axis] for axis in contracted)
    a = weight(A, _initializer(config, fan_in), names_a, contracted)
    b = weight(B, nn.initializers.zeros, names_b, (RANK,))
    into, out = f"{x},{''.join(names_a)}->{inner}", f"{inner},{''.join(names_b)}->{result}"
    if a.ndim > len(names_a):
        into, out = _by_row(into), _by_row(out)
    magnitude = known_share = None
    shape = {axis: size for axis, size in axes.items() if axis not in contracted}
    if module.has_variable("params", name + SHARE):
        ones = nn.initializers.ones
        known_share = param(module, name + SHARE, ones, shape, batch=batch, float32=True, by_row=True)
    elif config.dora:
        # Filled with the lengths of the weights that a run begins with, see ``lora.with_adapters``.
        magnitude = param(module, name + MAGNITUDE, nn.initializers.ones, shape, batch=batch, float32=True)
    return Adapter(
        module=module,
        config=config,
        stored=stored,
        letters=letters,
        into=into,
        out=out,
        a=a,
        b=b,
        scale=_scale(module, name, config),
        magnitude=magnitude,
        known_share=known_share,
        names_a=names_a,
        names_b=names_b,
        contracted=tuple(n for n, axis in enumerate(axes) if axis in contracted),
        precision=jax.lax.Precision.HIGHEST if float32 else None,
    )


def _scale(module: nn.Module, name: str, config: LoRAConfig) -> Array:
    init = nn.initializers.constant(config.scale)
    stored = param(module, name + SCALE, init, {}, float32=True, tracked=True)
    return jax.lax.stop_gradient(materialise(stored, _FLOAT32))


def _by_row(spec: str) -> str:
    """The einsum of activations and a matrix with a matrix for each row ``B``."""
    x, weight, result = re.split(",|->", spec)
    return f"{x.replace('...', 'B...')},B{weight}->{result.replace('...', 'B...')}"


def _gathered(weight: Array, axes: Iterable[str]) -> Array:
    """A part of an adapter as products use it; ``axes`` are those of a single one."""
    axes = tuple(axes)
    return gather(weight, ("batch", *axes) if weight.ndim > len(axes) else axes)


def _scaled(stored: Array, scale: Array, dtype: jnp.dtype) -> Array:
    """Cast first, so that weights which were cast before give the same."""
    return (materialise(stored, dtype).astype(jnp.float32) * scale).astype(dtype)


def _initializer(config: LoRAConfig, fan_in: int) -> nn.initializers.Initializer:
    if config.init == "gaussian":
        return nn.initializers.normal(1 / config.r)

    def uniform(key: Array, shape: tuple[int, ...], dtype: Open = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return uniform


class LookupAdapter(NamedTuple):
    """The adapter of a table, as it is stored: row i of the table gets ``scale * a[i] b``.

    Attributes:
      a_VR: zero at the start: rows of it are looked up. Or [B, V, R], as the next one.
      b_RD: random at the start.
      scale: float32 scalar.
    """

    a_VR: Array
    b_RD: Array
    scale: Array

    def of_rows(self, rows: Float[Array, "B T R"]) -> Float[Array, "B T D"]:
        """What rows of the table get, from those of ``a``."""
        return self._product("BTR,RD->BTD", rows, self._scaled_b(rows.dtype))

    def of_head(self, hidden: Float[Array, "*batch D"]) -> LowRank:
        """What the logits of a tied head get."""
        b_RD = self._scaled_b(hidden.dtype)
        h = self._product("...D,RD->...R", hidden, b_RD)
        return LowRank(h, _gathered(materialise(self.a_VR, hidden.dtype), ("vocab", RANK)).mT)

    def added(self, logits: Float[Array, "*batch V"], hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """The logits of a tied head with the adapter, from those of the table alone."""
        low = self.of_head(hidden)
        return logits + self._product("...R,RV->...V", low.h, low.b, logits.dtype)

    def merged(self, table_VD: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """The table with the adapter in it, in its dtype."""
        delta_VD = materialise(self.a_VR, _FLOAT32) @ _scaled(self.b_RD, self.scale, _FLOAT32)
        return (table_VD.astype(jnp.float32) + delta_VD).astype(table_VD.dtype)

    def _scaled_b(self, dtype: jnp.dtype) -> Array:
        return _gathered(_scaled(self.b_RD, self.scale, dtype), (RANK, "embed"))

    def _product(self, spec: str, x: Array, matrix: Array, out_dtype: jnp.dtype | None = None) -> Array:
        names = {"R": RANK, "D": "embed", "V": "vocab"}
        return product(spec if matrix.ndim == 2 else _by_row(spec), x, matrix, names, out_dtype)


def lookup_adapter(module: nn.Module, name: str, rows: int, width: int) -> LookupAdapter | None:
    """The adapter of a table; None where it has none."""
    if not is_targeted(module, name):
        return None
    config = _config(module)
    a_VR = param(module, name + A, nn.initializers.zeros, {"vocab": rows, RANK: config.r}, lookup=True, by_row=True)
    init = nn.initializers.normal(1.0)
    b_RD = param(module, name + B, init, {RANK: config.r, "embed": width}, contracted=(RANK,), by_row=True)
    return LookupAdapter(a_VR, b_RD, _scale(module, name, config))

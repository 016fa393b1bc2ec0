"""How keys and values are stored: in their own dtype, or in 8 bits with one scale per token and head.

R layers of a stack, B batch, T tokens, S slots, K key/value heads, H head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.stored import Stored, numbers
from stellarbyte_jax.sharding import constrain

# Integers of the same size hold the narrow floats: XLA on a CPU would widen a whole array to update one token of it.
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
_AXES = {5: ("layers", "batch", "slots", "kv_heads", "head_dim"), 4: ("layers", "batch", "kv_heads", "slots")}
ByAxes = Callable[[tuple[str | None, ...], Array], Array]


def split_by(axes: tuple[str | None, ...], x: Array) -> Array:
    """An array of a state as it lies on the mesh that is set: as the rules say of its logical axes."""
    return constrain(x, axes)


@struct.dataclass
class Storage:
    """Keys and values of stacked layers.

    Attributes:
      keys: [R, B, S, K, H], of ``dtype`` or of the unsigned integers that hold its bits.
      values: like the keys.
      key_scales: float32 [R, B, K, S] for 8 bits, else None: a kernel reads those of one head.
      value_scales: like the key scales.
      dtype: static; what the numbers mean.
    """

    keys: Array
    values: Array
    key_scales: Array | None
    value_scales: Array | None
    dtype: str = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> "Storage":
        """Slots without content; ``shape`` is [R, B, S, K, H]."""
        held = _BITS.get(dtype, dtype)
        scaled = jnp.dtype(dtype).itemsize == 1
        keys, values = jnp.zeros(shape, held), jnp.zeros(shape, held)
        R, B, S, K, _ = shape
        scales = (jnp.zeros((R, B, K, S)), jnp.zeros((R, B, K, S))) if scaled else (None, None)
        return cls(keys, values, *scales, dtype=dtype)

    @property
    def slots(self) -> int:
        """S."""
        return self.keys.shape[2]

    def encode(self, k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]) -> "Storage":
        """Keys and values of one layer as they are stored here, without the axis of layers."""
        if self.key_scales is None:
            return self.replace(keys=self._bits(k_BTKH), values=self._bits(v_BTKH))  # type: ignore[attr-defined]
        keys, key_scales = quantize(k_BTKH, self.dtype)
        values, value_scales = quantize(v_BTKH, self.dtype)
        scales = (jnp.swapaxes(x, 1, 2) for x in (key_scales, value_scales))
        return Storage(self._bits(keys), self._bits(values), *scales, dtype=self.dtype)

    def decode(self, dtype: jnp.dtype) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer, from what :meth:`layer` or :meth:`encode` gave."""
        keys, values = numbers(self.keys, self.dtype), numbers(self.values, self.dtype)
        if self.key_scales is None or self.value_scales is None:
            return keys.astype(dtype), values.astype(dtype)
        keys = keys.astype(jnp.float32) * jnp.swapaxes(self.key_scales, 1, 2)[..., None]
        values = values.astype(jnp.float32) * jnp.swapaxes(self.value_scales, 1, 2)[..., None]
        return keys.astype(dtype), values.astype(dtype)

    def layer(self, layer: Int[Array, ""]) -> "Storage":
        """What one layer holds."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self)

    def stored(self, layer: Int[Array, ""], ends_B: Int[Array, " B"] | None) -> Stored:
        """What one layer holds, for kernels that read it where it is."""
        return Stored(self.keys, self.values, self.key_scales, self.value_scales, layer, ends_B, self.dtype)

    def joined(self, new: "Storage") -> "Storage":
        """The slots of one layer, and encoded tokens behind them."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=_slots_axis(a)), self, new)

    def taken(self, order_BSK: Int[Array, "B S K"]) -> "Storage":
        """These slots of one layer, each head its own."""

        def take(x: Array) -> Array:
            order = jnp.swapaxes(order_BSK, 1, 2) if x.ndim == 3 else order_BSK[..., None]
            return jnp.take_along_axis(x, order, axis=_slots_axis(x))

        return jax.tree.map(take, self)

    def write(self, layer: Int[Array, ""], slots_BT: Int[Array, "B T"], new: "Storage") -> "Storage":
        """Puts encoded tokens into slots of one layer, in place where the caller gives its storage away.

        No two tokens of a row may have the same slot; those whose slot does not exist are not stored.
        """
        indices_BT2 = jnp.stack([jnp.broadcast_to(layer, slots_BT.shape), slots_BT], axis=-1)
        written = jax.tree.map(lambda old, x: _put(old, indices_BT2, x), self, new)
        return written.by_axes(split_by)

    def replace_layer(self, layer: Int[Array, ""], new: "Storage") -> "Storage":
        """Puts all slots of one layer in."""
        put = jax.tree.map(lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x, layer, axis=0), self, new)
        return put.by_axes(split_by)

    def select(self, rows_B: Int[Array, " B"]) -> "Storage":
        """The storage of these rows."""
        return jax.tree.map(lambda x: jnp.take(x, rows_B, axis=1), self)

    def by_axes(self, of: ByAxes) -> "Storage":
        """A storage of what ``of`` makes of the logical axes of each array, and the array."""
        return jax.tree.map(lambda x: of(_AXES[x.ndim], x), self)

    def _bits(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        return jax.lax.bitcast_convert_type(x, _BITS[self.dtype]) if self.dtype in _BITS else x


def _slots_axis(of_layer: Array) -> int:
    return 2 if of_layer.ndim == 3 else 1


def _put(old: Array, indices_BT2: Int[Array, "B T 2"], new: Array) -> Array:
    """Rows [B, T, K, H] of new tokens in [R, B, S, K, H], by layer and slot, or scales [B, K, T] in [R, B, K, S].

    The rows of a batch are a batch of the scatter: with their numbers among the indices, a mesh that splits them would
    gather the tokens of all rows on every device.
    """
    slots = _slots_axis(new) + 1
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1,) if new.ndim == 3 else (2, 3),
        inserted_window_dims=(0, slots),
        scatter_dims_to_operand_dims=(0, slots),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(old, indices_BT2, new, dims, unique_indices=True, mode=mode)


def quantize(x: Float[Array, "B T K H"], dtype: str) -> tuple[Array, Float[Array, "B T K"]]:
    """8-bit codes, and the scale of each token and head that gives its largest number the largest code."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = 127.0 if integer else float(jnp.finfo(dtype).max)
    x32 = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x32), axis=-1), 1e-12) / largest
    codes = x32 / scales[..., None]
    return (jnp.round(codes) if integer else codes).astype(dtype), scales

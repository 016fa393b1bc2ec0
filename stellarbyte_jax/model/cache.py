"""The key/value cache of generation: a pytree that goes into the model as an argument and comes back as a result.

R layers of one kind, B batch, T new tokens, S slots, K key/value heads, H head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import struct

from stellarbyte_jax.config import ByteConfig, LayerKind

# What is stored of one kind of layers: "keys" and "values" [R, B, S, K, H] and, for 8 bits, their scales [R, B, S, K].
Slots = dict[str, jax.Array]


class Plan(NamedTuple):
    """Where one call writes in the layers of one kind.

    Attributes:
      slots_BT: slot of each new token; from S on where it is not kept.
      positions_BS: position that each slot holds after the call, -1 for none.
    """

    slots_BT: jax.Array
    positions_BS: jax.Array


class CacheRows:
    """What every cache can say of its rows and do with them."""

    slots: tuple[Slots, ...]
    lengths: jax.Array

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(x.nbytes for x in jax.tree.leaves(self.slots))

    def select(self, rows: jax.Array | Sequence[int]) -> Self:
        """The cache of these rows, in this order: a smaller batch, another order, or rows several times."""
        raise NotImplementedError

    def reset(self, rows_B: jax.Array | None = None) -> Self:
        """The cache with these rows (bool [B]; all of them where not given) empty."""
        raise NotImplementedError

    def grow(self, batch_size: int) -> Self:
        """The cache with empty rows behind the others.

        Raises:
          ValueError: there are more rows already; use :meth:`select`.
        """
        have = self.batch_size
        if batch_size < have:
            raise ValueError(f"the cache has {have} rows: name those of {batch_size} to keep with select()")
        rows = [*range(have), *[0] * (batch_size - have)]
        return self.select(rows).reset(jnp.arange(batch_size) >= have)


@struct.dataclass
class KVCache(CacheRows):
    """Keys and values of every layer. Windowed layers keep a window in a ring, the others every token.

    Attributes:
      slots: for each kind of the layer pattern what its layers hold.
      positions: for each kind the position of the token in each slot, int32 [B, S]; -1 for none.
      lengths: position of each row's next token, int32 [B].
      kinds: static; the layer pattern.
      sink_tokens: static; first tokens that rings keep.
      fresh: static; True until the first update. The first tokens attend to each other alone, with the fast kernels.
    """

    slots: tuple[Slots, ...]
    positions: tuple[jax.Array, ...]
    lengths: jax.Array
    kinds: tuple[LayerKind, ...] = struct.field(pytree_node=False)
    sink_tokens: int = struct.field(pytree_node=False, default=0)
    fresh: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def create(cls, config: ByteConfig, batch_size: int, max_length: int, dtype: str | None = None) -> Self:
        """An empty cache for ``max_length`` tokens a row; ``dtype`` where it is not ``config.cache.dtype``.

        ``int8`` and ``float8_e4m3fn`` store each head of each token with a float32 scale of its own.
        """
        kinds = pattern(config)
        dtype = storage_dtype(config, dtype)
        slots, positions = [], []
        for kind in kinds:
            S = max_length + first_position(config)
            if kind.window is not None:
                S = pinned_slots(kind, config.sink_tokens) + min(kind.window, S)
            shape = (config.num_hidden_layers // len(kinds), batch_size, S, config.kv_heads, config.head_size)
            slots.append(empty_slots(shape, dtype))
            positions.append(jnp.full((batch_size, S), -1, jnp.int32))
        lengths = jnp.zeros(batch_size, jnp.int32)
        return cls(tuple(slots), tuple(positions), lengths, kinds, config.sink_tokens)

    def behind_memory(self, valid: Sequence[jax.Array]) -> tuple[Self, tuple[jax.Array, ...]]:
        """The empty cache of rows whose tokens come behind a memory, and the slots of that in each kind's ring.

        ``valid`` says for each kind which of its fused and sliding slots hold something, bool [B, F + M]. The caller
        writes keys and values of memory into the slots, int32 [B, F + M].
        """
        first = max(kind.sliding + kind.fused for kind in self.kinds)
        positions, slots = [], []
        for kind, valid_BM, empty_BS in zip(self.kinds, valid, self.positions, strict=True):
            S = empty_BS.shape[1]
            M = kind.fused + kind.sliding
            at_M = first - M + jnp.arange(M, dtype=jnp.int32)
            to_M = jnp.arange(M, dtype=jnp.int32)
            if M:
                to_M = jnp.where(to_M < kind.fused, to_M, kind.fused + at_M % (S - kind.fused))
            to_BM = jnp.where(valid_BM, to_M[None, :], S + jnp.arange(M, dtype=jnp.int32)[None, :])
            rows_B1 = jnp.arange(self.batch_size, dtype=jnp.int32)[:, None]
            at_BM = jnp.broadcast_to(at_M[None, :], to_BM.shape)
            positions.append(empty_BS.at[rows_B1, to_BM].set(at_BM, mode="drop", unique_indices=True))
            slots.append(to_BM)
        lengths = jnp.full_like(self.lengths, first)
        return self.replace(positions=tuple(positions), lengths=lengths), tuple(slots)  # type: ignore[attr-defined]

    def plan(self, positions_BT: jax.Array, real_BT: jax.Array) -> tuple[Plan, ...]:
        """Where tokens at these positions go, for each kind. Tokens that are not real go nowhere.

        Raises:
          ValueError: there are more new tokens than slots.
        """
        plans = []
        end_B1 = jnp.max(jnp.where(real_BT, positions_BT, -1), axis=1, keepdims=True) + 1
        T = positions_BT.shape[1]
        for kind, positions_BS in zip(self.kinds, self.positions, strict=True):
            S = positions_BS.shape[1]
            kept_BT, slots_BT = real_BT, positions_BT
            if kind.window is None:
                if T > S:
                    raise ValueError(f"{T} tokens do not fit into a cache of {S} slots: make a longer cache")
            else:
                pinned = pinned_slots(kind, self.sink_tokens)
                sinks = self.sink_tokens
                ring = S - pinned
                slots_BT = pinned + (positions_BT - sinks) % ring
                if sinks:
                    slots_BT = jnp.where(positions_BT < sinks, positions_BT, slots_BT)
                kept_BT = real_BT & ((positions_BT >= end_B1 - ring) | (positions_BT < sinks))
            nowhere_T = S + jnp.arange(T, dtype=jnp.int32)
            slots_BT = jnp.where(kept_BT, slots_BT, nowhere_T[None, :])
            rows_B1 = jnp.arange(positions_BT.shape[0], dtype=jnp.int32)[:, None]
            after_BS = positions_BS.at[rows_B1, slots_BT].set(positions_BT, mode="drop", unique_indices=True)
            plans.append(Plan(slots_BT, after_BS))
        return tuple(plans)

    def write(self, kind: int, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array) -> Self:
        """Stores keys and values of one layer in these slots."""
        rows_B1 = jnp.arange(k_BTKH.shape[0], dtype=jnp.int32)[:, None]
        old = self.slots[kind]
        new = encode(k_BTKH, v_BTKH, old["keys"].dtype)
        slots = {
            name: old[name].at[layer, rows_B1, slots_BT].set(new[name], mode="drop", unique_indices=True)
            for name in old
        }
        return self._with(kind, slots)

    def extend(
        self, kind: int, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, plan: Plan
    ) -> tuple[Self, jax.Array, jax.Array, jax.Array]:
        """The cache with new tokens, and what they attend to: keys, values [B, S', K, H] and positions [B, S', 1]."""
        T = k_BTKH.shape[1]
        written = self.write(kind, layer, k_BTKH, v_BTKH, plan.slots_BT)
        if self.kinds[kind].window is None or T == 1:
            keys_BSKH, values_BSKH = decode(layer_slots(written.slots[kind], layer), k_BTKH.dtype)
            return written, keys_BSKH, values_BSKH, plan.positions_BS[:, :, None]
        # A ring loses keys that the first of several new tokens still need: they see it as it was, and each other.
        keys_BSKH, values_BSKH = decode(layer_slots(self.slots[kind], layer), k_BTKH.dtype)
        positions_BT = self._new_positions(T)
        positions_BS = jnp.concatenate([self.positions[kind], positions_BT], axis=1)
        keys_BSKH = jnp.concatenate([keys_BSKH, k_BTKH], axis=1)
        return written, keys_BSKH, jnp.concatenate([values_BSKH, v_BTKH], axis=1), positions_BS[:, :, None]

    def settle(self, kind: int, layer: jax.Array, weights_BKGTS: jax.Array) -> Self:
        """Takes note of a layer's attention weights; here they decide nothing."""
        del kind, layer, weights_BKGTS
        return self

    def finish(self, plans: Sequence[Plan], lengths_B: jax.Array) -> Self:
        """The cache after each row took ``lengths_B`` more tokens."""
        positions = tuple(plan.positions_BS for plan in plans)
        return self.replace(positions=positions, lengths=self.lengths + lengths_B, fresh=False)  # type: ignore[attr-defined]

    def select(self, rows: jax.Array | Sequence[int]) -> Self:
        """The cache of these rows, in this order: a smaller batch, another order, or rows several times."""
        rows_B = jnp.asarray(rows, jnp.int32)
        slots = jax.tree.map(lambda x: jnp.take(x, rows_B, axis=1), self.slots)
        positions = tuple(jnp.take(p, rows_B, axis=0) for p in self.positions)
        return self.replace(slots=slots, positions=positions, lengths=self.lengths[rows_B])  # type: ignore[attr-defined]

    def reset(self, rows_B: jax.Array | None = None) -> Self:
        """The cache with these rows (bool [B]; all of them where not given) empty."""
        if rows_B is None:
            rows_B = jnp.ones(self.batch_size, bool)
        positions = tuple(jnp.where(rows_B[:, None], -1, p) for p in self.positions)
        return self.replace(positions=positions, lengths=jnp.where(rows_B, 0, self.lengths))  # type: ignore[attr-defined]

    def _new_positions(self, T: int) -> jax.Array:
        return self.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]

    def _with(self, kind: int, slots: Slots) -> Self:
        kept = tuple(slots if i == kind else old for i, old in enumerate(self.slots))
        return self.replace(slots=kept)  # type: ignore[attr-defined]


def make_cache(config: ByteConfig, batch_size: int, max_length: int) -> Any:
    """The empty cache that ``config.cache`` asks for: of every token, or pruned."""
    from stellarbyte_jax.model.pruned_cache import PrunedCache

    if config.cache.recent is not None:
        return PrunedCache.create(config, batch_size)
    return KVCache.create(config, batch_size, max_length)


def pattern(config: ByteConfig) -> tuple[LayerKind, ...]:
    """The shortest repeating pattern of layer kinds; layers are stacked by place in it."""
    kinds = config.layer_kinds
    for period in range(1, len(kinds) + 1):
        if len(kinds) % period == 0 and kinds[:period] * (len(kinds) // period) == kinds:
            return kinds[:period]
    raise AssertionError("a sequence repeats itself after its whole length")


def first_position(config: ByteConfig) -> int:
    """Position of the first token behind a memory: its slots come before."""
    return max(kind.sliding + kind.fused for kind in config.layer_kinds)


def pinned_slots(kind: LayerKind, sink_tokens: int) -> int:
    """Slots before a ring, which it never overwrites: sink tokens, or fused memory."""
    return sink_tokens + kind.fused if kind.window is not None else 0


def storage_dtype(config: ByteConfig, dtype: str | None = None) -> str:
    """The dtype that keys and values are stored in."""
    dtype = dtype or config.cache.dtype
    return config.compute_dtype if dtype == "compute" else dtype


def empty_slots(shape: tuple[int, ...], dtype: str) -> Slots:
    """Slots without content, ``shape`` [R, B, S, K, H]."""
    slots = {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}
    if jnp.dtype(dtype).itemsize == 1:
        slots |= {"key_scales": jnp.zeros(shape[:-1]), "value_scales": jnp.zeros(shape[:-1])}
    return slots


def encode(k_BTKH: jax.Array, v_BTKH: jax.Array, dtype: Any) -> Slots:
    """Keys and values as they are stored: 8 bits share out the range of each head of each token."""
    if jnp.dtype(dtype).itemsize > 1:
        return {"keys": k_BTKH.astype(dtype), "values": v_BTKH.astype(dtype)}
    keys, key_scales = _quantize(k_BTKH, dtype)
    values, value_scales = _quantize(v_BTKH, dtype)
    return {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}


def decode(slots: Slots, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of what is stored."""
    if "key_scales" not in slots:
        return slots["keys"].astype(dtype), slots["values"].astype(dtype)
    keys = slots["keys"].astype(jnp.float32) * slots["key_scales"][..., None]
    values = slots["values"].astype(jnp.float32) * slots["value_scales"][..., None]
    return keys.astype(dtype), values.astype(dtype)


def _quantize(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = 127.0 if integer else float(jnp.finfo(dtype).max)
    x32 = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x32), axis=-1), 1e-12) / largest
    codes = x32 / scales[..., None]
    return (jnp.round(codes) if integer else codes).astype(dtype), scales


def layer_slots(slots: Slots, layer: jax.Array) -> Slots:
    """What one layer holds."""
    return {name: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for name, x in slots.items()}

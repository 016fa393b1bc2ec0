"""The cache of layers that attend to every earlier token, and what it shares with the ring.

R layers of a stack, B batch, T new tokens, S slots, K key/value heads, H head size.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from stellarbyte_jax.model.state.layer_cache import CachedKV, NewTokens
from stellarbyte_jax.model.state.storage import ByAxes, Storage
from stellarbyte_jax.sharding import constrain


@struct.dataclass
class FullCache:
    """Keys and values of every token; the slot of a token is its position.

    Attributes:
      storage: keys and values of the stack.
      positions_BS: position of the token in each slot, int32; -1 for none. The same in every layer.
      layer: the current layer, int32.
      new: the tokens of the call, with ``write_indices_BT``, the slot of each (from S on: it is not stored); None
        between calls.
      write_indices_BT: see ``new``.
      ends_B: during a call, the slot behind the last one of each row that holds a token.
      fresh: static; True until the first call, whose tokens attend to each other alone, with the fused kernels.
    """

    storage: Storage
    positions_BS: Array
    layer: Array
    new: NewTokens | None = None
    write_indices_BT: Array | None = None
    ends_B: Array | None = None
    fresh: bool = struct.field(pytree_node=False, default=True)

    @property
    def needs_weights(self) -> bool:
        """False: nothing is evicted."""
        return False

    def begin(self, new: NewTokens) -> Self:
        """Finds a slot for each token; raises ValueError where there are more tokens than slots."""
        T = new.positions_BS.shape[1]
        if T > self.storage.slots:
            raise ValueError(f"{T} tokens do not fit into a cache of {self.storage.slots} slots: make a longer cache")
        return self._write_to(new, new.positions_BS, new.valid_BS)

    def at(self, layer: Int[Array, ""]) -> Self:
        """The cache with another current layer."""
        return self.replace(layer=layer)  # type: ignore[attr-defined]

    def append(self, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]) -> tuple[Self, CachedKV]:
        """Stores the tokens; their queries see each other (first call), or all that is stored."""
        written = self._written(k_BSKH, v_BSKH)
        if self.fresh:
            return written, self._among_new(k_BSKH, v_BSKH)
        return written, written._all_stored(k_BSKH.dtype)

    def accumulate(self, weights_BKGTS: Float[Array, "B K G T S"] | None) -> Self:
        """No-op: only score-based eviction uses the weights."""
        del weights_BKGTS
        return self

    def end(self) -> Self:
        """The cache after the call."""
        return self.replace(new=None, write_indices_BT=None, ends_B=None, fresh=False)  # type: ignore[attr-defined]

    def select(self, rows_B: Int[Array, " B"]) -> Self:
        """The cache of these rows."""
        positions_BS = jnp.take(self.positions_BS, rows_B, axis=0)
        return self.replace(storage=self.storage.select(rows_B), positions_BS=positions_BS)  # type: ignore[attr-defined]

    def reset(self, rows_B: Bool[Array, " B"]) -> Self:
        """The cache with these rows empty."""
        return self.replace(positions_BS=jnp.where(rows_B[:, None], -1, self.positions_BS))  # type: ignore[attr-defined]

    def by_axes(self, of: ByAxes) -> Self:
        """The cache between calls of what ``of`` makes of the logical axes of each array, and the array."""
        positions_BS = of(("batch", "slots"), self.positions_BS)
        return self.replace(storage=self.storage.by_axes(of), positions_BS=positions_BS)  # type: ignore[attr-defined]

    def _write_to(self, new: NewTokens, slots_BT: Array, stored_BT: Array) -> Self:
        """Notes where the call's tokens go, and which positions the slots then hold."""
        T = slots_BT.shape[1]
        nowhere_T = self.storage.slots + jnp.arange(T, dtype=jnp.int32)
        # Said of the rows, or a mesh would split them further and gather these indices in every layer.
        slots_BT = constrain(jnp.where(stored_BT, slots_BT, nowhere_T[None, :]), ("batch", None))

        # Row by row, as keys and values are written: see there.
        def put(old_S: Array, slots_T: Array, positions_T: Array) -> Array:
            return old_S.at[slots_T].set(positions_T, mode="drop", unique_indices=True)

        after_BS = jax.vmap(put)(self.positions_BS, slots_BT, new.positions_BS)
        # Once a call: in the loop over the layers it would be computed in each.
        behind_1S = jnp.arange(1, after_BS.shape[1] + 1, dtype=jnp.int32)[None, :]
        ends_B = jnp.max(jnp.where(after_BS >= 0, behind_1S, 0), axis=1)
        begun = self.replace(positions_BS=after_BS, new=new, write_indices_BT=slots_BT)  # type: ignore[attr-defined]
        return begun.replace(ends_B=ends_B)

    def _written(self, k_BSKH: Array, v_BSKH: Array) -> Self:
        assert self.write_indices_BT is not None
        new = self.storage.encode(k_BSKH, v_BSKH)
        storage = self.storage.write(self.layer, self.write_indices_BT, new)
        return self.replace(storage=storage)  # type: ignore[attr-defined]

    def _all_stored(self, dtype: jnp.dtype) -> CachedKV:
        """What the current layer holds."""
        keys_BSKH, values_BSKH = self.storage.layer(self.layer).decode(dtype)
        stored = self.storage.stored(self.layer, self.ends_B)
        return CachedKV(keys_BSKH, values_BSKH, self.positions_BS[:, :, None], stored=stored)

    def _among_new(self, k_BSKH: Array, v_BSKH: Array) -> CachedKV:
        """The new tokens as they are: those of the first call need not be read back."""
        assert self.new is not None
        memory = self.new.memory_slots
        # Padding comes after all tokens that count, so causality hides it; empty memory slots come before.
        valid_BS = self.new.valid_BS.at[:, memory:].set(True) if memory else None
        return CachedKV(k_BSKH, v_BSKH, self.new.positions_BS[:, :, None], None, valid_BS, aligned=True)

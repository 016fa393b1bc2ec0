"""The cache of windowed layers: a ring of the newest tokens.

R layers of a stack, B batch, T new tokens, S slots, K key/value heads, H head size.
"""

from typing import Self

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from stellarbyte_jax.model.state.full import FullCache
from stellarbyte_jax.model.state.layer_cache import CachedKV, NewTokens
from stellarbyte_jax.ops.attention import always_visible


@struct.dataclass
class RingCache(FullCache):
    """Keys and values of a window, and before them those that the ring never overwrites.

    Attributes:
      sink_tokens: static; first tokens of a text, which keep the slots of their positions.
      compressed: static; slots of compressed memory, which come first.
      before_BS: during a call, ``positions_BS`` as they were before it.
    """

    before_BS: Array | None = None
    sink_tokens: int = struct.field(pytree_node=False, default=0)
    compressed: int = struct.field(pytree_node=False, default=0)

    def begin(self, new: NewTokens) -> Self:
        """Finds a slot for each token that is still within the window at the end of the call."""
        first = self.sink_tokens + self.compressed
        ring = self.storage.slots - first
        positions_BS = new.positions_BS
        end_B1 = jnp.max(jnp.where(new.valid_BS, positions_BS, -1), axis=1, keepdims=True) + 1
        slots_BS = first + (positions_BS - self.sink_tokens) % ring
        stays_BS = positions_BS >= end_B1 - ring
        if self.sink_tokens:
            slots_BS = jnp.where(positions_BS < self.sink_tokens, positions_BS, slots_BS)
            stays_BS |= positions_BS < self.sink_tokens
        if self.compressed and new.memory_slots:
            columns_1S = jnp.arange(positions_BS.shape[1], dtype=jnp.int32)[None, :]
            slots_BS = jnp.where(columns_1S < self.compressed, columns_1S, slots_BS)
            stays_BS |= columns_1S < self.compressed
        begun = self._write_to(new, slots_BS, new.valid_BS & stays_BS)
        return begun.replace(before_BS=self.positions_BS)  # type: ignore[attr-defined]

    def append(self, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]) -> tuple[Self, CachedKV]:
        """Stores the tokens; their queries see what the window leaves of the earlier ones, and each other."""
        assert self.new is not None and self.before_BS is not None
        written = self._written(k_BSKH, v_BSKH)
        if self.fresh:
            return written, self._with_visible(self._among_new(k_BSKH, v_BSKH))
        if k_BSKH.shape[1] == 1:
            return written, self._with_visible(written._all_stored(k_BSKH.dtype))
        # The ring loses keys that the first of several new tokens still need: they see it as it was, and each other.
        keys_BSKH, values_BSKH = self.storage.layer(self.layer).decode(k_BSKH.dtype)
        positions_BS = jnp.concatenate([self.before_BS, self.new.positions_BS], axis=1)
        keys_BSKH = jnp.concatenate([keys_BSKH, k_BSKH], axis=1)
        values_BSKH = jnp.concatenate([values_BSKH, v_BSKH], axis=1)
        return written, self._with_visible(CachedKV(keys_BSKH, values_BSKH, positions_BS[:, :, None]))

    def end(self) -> Self:
        """The cache after the call."""
        return super().end().replace(before_BS=None)  # type: ignore[attr-defined]

    def _with_visible(self, found: CachedKV) -> CachedKV:
        """Sink tokens and compressed memory are seen from everywhere."""
        assert self.new is not None
        # The keys of a first call are the call's own, which begin with the compressed slots only where it has a memory.
        compressed = self.compressed if self.new.memory_slots or not found.aligned else 0
        visible_BSK = always_visible(found.positions_BSK, sink_tokens=self.sink_tokens, compressed=compressed)
        return found._replace(always_visible_BSK=visible_BSK)

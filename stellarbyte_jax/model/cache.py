"""The key/value cache of generation: a pytree that goes into the model as an argument and comes back as a result.

R layers of one kind, B batch, S slots, K key/value heads, H head size.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from stellarbyte_jax.config import ByteConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer. Slot s of a row holds its token at position s.

    Attributes:
      keys: for each layer kind of the repeating pattern, rotated keys [R, B, S, K, H].
      values: the same for values.
      lengths: tokens seen by each row, int32 [B].
      fresh: static; True until the first update. The first tokens attend to each other alone, with the fast kernels.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    fresh: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def create(cls, config: ByteConfig, batch_size: int, max_length: int, dtype: str | None = None) -> Self:
        """An empty cache for ``max_length`` tokens a row, in the compute dtype unless another is named."""
        kinds = len(pattern(config))
        shape = (config.num_hidden_layers // kinds, batch_size, max_length, config.kv_heads, config.head_size)
        made = [jnp.zeros(shape, dtype or config.compute_dtype) for _ in range(2 * kinds)]
        return cls(tuple(made[:kinds]), tuple(made[kinds:]), jnp.zeros(batch_size, jnp.int32))

    @property
    def max_length(self) -> int:
        """Number of slots of a row."""
        return self.keys[0].shape[2]

    def write(self, kind: int, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Self:
        """Stores new keys and values of one layer behind each row's tokens; lengths stay as they are.

        Raises:
          ValueError: there are more new tokens than slots.
        """
        B, T = k_BTKH.shape[:2]
        if T > self.max_length:
            raise ValueError(f"{T} tokens do not fit into a cache of {self.max_length} slots: make a longer cache")

        def put(old_RBSKH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new_BTKH = new_BTKH.astype(old_RBSKH.dtype)
            if self.fresh:
                zero = jnp.zeros((), jnp.int32)
                return jax.lax.dynamic_update_slice(old_RBSKH, new_BTKH[None], (layer, zero, zero, zero, zero))
            rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
            slots_BT = self.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
            return old_RBSKH.at[layer, rows_B1, slots_BT].set(new_BTKH, mode="drop", unique_indices=True)

        keys = tuple(put(k, k_BTKH) if i == kind else k for i, k in enumerate(self.keys))
        values = tuple(put(v, v_BTKH) if i == kind else v for i, v in enumerate(self.values))
        return self.replace(keys=keys, values=values)  # type: ignore[attr-defined]

    def read(self, kind: int, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of one layer."""
        return (
            jax.lax.dynamic_index_in_dim(self.keys[kind], layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values[kind], layer, keepdims=False),
        )

    def advance(self, lengths_B: jax.Array) -> Self:
        """The cache after each row took ``lengths_B`` more tokens."""
        return self.replace(lengths=self.lengths + lengths_B, fresh=False)  # type: ignore[attr-defined]


def pattern(config: ByteConfig) -> tuple[int | None, ...]:
    """The shortest repeating pattern of attention windows over the layers; layers are stacked by place in it."""
    windows = config.windows
    for period in range(1, len(windows) + 1):
        if len(windows) % period == 0 and windows[:period] * (len(windows) // period) == windows:
            return windows[:period]
    raise AssertionError("a sequence repeats itself after its whole length")

"""What sees what, as data.

B batch (1 where all rows are alike), T queries, S keys, K key/value heads (1 where all are alike).
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Mask:
    """Which keys each query sees: those that are not later, of its own segment and within its window.

    Indices in the row are arrays: nothing is counted from 0, and T and S may differ. So a query may see keys of a
    cache, whose slots are in any order, or of another device.

    Attributes:
      q_positions_BT: int32 [B, T], index of each query in its row.
      k_positions_BSK: int32 [B, S, K], index of each key in its row; negative for a slot without a key.
      q_segments_BT: int32 [B, T], document of each query; None where a row is one document.
      k_segments_BS: int32 [B, S], document of each key. Equal ids must be neighbours.
      k_valid_BS: bool [B, S], False for keys that nobody sees, such as empty slots of a memory; None for none.
      always_visible_BSK: bool [B, S, K], keys that a window does not hide, such as sink tokens or compressed memory.
      window: static; number of keys that a query sees, itself included; None for all.
      max_segments: static; upper bound on the segments of a row. The packed cuDNN kernel needs it.
      aligned: static; True says that indices grow along both axes and that query t has the index of key t + S - T,
        which lets a kernel count instead of reading them.
    """

    q_positions_BT: Array
    k_positions_BSK: Array
    q_segments_BT: Array | None = None
    k_segments_BS: Array | None = None
    k_valid_BS: Array | None = None
    always_visible_BSK: Array | None = None
    window: int | None = struct.field(pytree_node=False, default=None)
    max_segments: int | None = struct.field(pytree_node=False, default=None)
    aligned: bool = struct.field(pytree_node=False, default=False)

    def allowed(self) -> Bool[Array, "B K T S"]:
        """Whether each query sees each key."""
        keys_BK1S = jnp.swapaxes(self.k_positions_BSK, 1, 2)[:, :, None, :]
        distance_BKTS = self.q_positions_BT[:, None, :, None] - keys_BK1S
        allowed_BKTS = (distance_BKTS >= 0) & (keys_BK1S >= 0)
        if self.window is not None:
            near_BKTS = distance_BKTS < self.window
            if self.always_visible_BSK is not None:
                near_BKTS = near_BKTS | jnp.swapaxes(self.always_visible_BSK, 1, 2)[:, :, None, :]
            allowed_BKTS = allowed_BKTS & near_BKTS
        if self.q_segments_BT is not None and self.k_segments_BS is not None:
            same_BTS = self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
            allowed_BKTS = allowed_BKTS & same_BTS[:, None]
        if self.k_valid_BS is not None:
            allowed_BKTS = allowed_BKTS & self.k_valid_BS[:, None, None, :]
        return allowed_BKTS


def always_visible(
    positions_BSK: Int[Array, "B S K"], *, sink_tokens: int = 0, compressed: int = 0
) -> Bool[Array, "#B S #K"] | None:
    """Which keys no window hides: the first tokens of a text, and compressed memory, whose slots come first.

    Args:
      positions_BSK: position of each key in its text.
      sink_tokens: number of first tokens.
      compressed: number of compressed slots among the keys.
    """
    visible_BSK = positions_BSK < sink_tokens if sink_tokens else None
    if not compressed:
        return visible_BSK
    first_1S1 = (jnp.arange(positions_BSK.shape[1], dtype=jnp.int32) < compressed)[None, :, None]
    return first_1S1 if visible_BSK is None else visible_BSK | first_1S1

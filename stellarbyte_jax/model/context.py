"""What every layer of a call is given besides the activations.

B batch, T new positions, M memory slots, S = M + T.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from stellarbyte_jax.config import LayerSpec
from stellarbyte_jax.model.state.memory import LayerMemory, with_memory_prefix
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.ops.attention import Mask, always_visible
from stellarbyte_jax.ops.rotary import Frequencies


@struct.dataclass
class LayerContext:
    """The tokens of a call, as its layers see them.

    Attributes:
      positions_BT: int32 [B, T], position of each new token in its document or its text.
      rows_BT: int32 [B or 1, T], index of each new token in its row.
      segment_ids_BT: int32 [B, T], document of each new token, or None where a row is one document.
      rope: rotary frequencies of the new tokens.
      valid_BT: bool [B, T], False for padding; None where there is none.
      dealt: static; whether the tokens are dealt out to the devices of a mesh by position.
      pool: weights of the experts that all layers share; None where each has its own.
      max_segments: static; upper bound on the documents of a row.
      train: static; whether dropout is on.
    """

    positions_BT: Array
    rows_BT: Array
    segment_ids_BT: Array | None
    rope: Frequencies
    max_segments: int | None = struct.field(pytree_node=False, default=None)
    train: bool = struct.field(pytree_node=False, default=False)
    valid_BT: Array | None = None
    pool: Params | None = None
    dealt: bool = struct.field(pytree_node=False, default=False)

    @property
    def tokens(self) -> Bool[Array, "B T"]:
        """Which positions [B, T] hold tokens; the others are padding."""
        return jnp.ones(self.positions_BT.shape, bool) if self.valid_BT is None else self.valid_BT

    @property
    def starts(self) -> Bool[Array, "B T"]:
        """Whether a token begins a document."""
        starts_BT = self.positions_BT == 0
        if self.segment_ids_BT is None:
            return starts_BT
        ids_BT = self.segment_ids_BT
        return starts_BT | jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)))

    def mask(self, spec: LayerSpec, memory: LayerMemory | None, sink_tokens: int) -> Mask:
        """What the new tokens see of each other, and of a memory before them.

        Memory belongs to the document that a row begins with.
        """
        rows_BS, ids_BS, valid_BS, positions_BS = self.rows_BT, self.segment_ids_BT, None, self.positions_BT
        compressed = 0
        if memory is not None:
            M = memory.valid_BM.shape[1]
            rows_BS, positions_BS = (with_memory_prefix(x, M) for x in (rows_BS, positions_BS))
            rows_BS += M  # negative ones are empty slots
            valid_BS = jnp.concatenate([memory.valid_BM, jnp.ones(self.positions_BT.shape, bool)], axis=1)
            if ids_BS is not None:
                ids_BS = jnp.concatenate([jnp.broadcast_to(ids_BS[:, :1], memory.valid_BM.shape), ids_BS], axis=1)
            compressed = spec.compressed
        T = self.rows_BT.shape[1]
        visible_BSK = None
        if spec.window is not None:
            visible_BSK = always_visible(positions_BS[..., None], sink_tokens=sink_tokens, compressed=compressed)
        return Mask(
            rows_BS[:, -T:],
            rows_BS[..., None],
            q_segments_BT=self.segment_ids_BT,
            k_segments_BS=ids_BS,
            k_valid_BS=valid_BS,
            always_visible_BSK=visible_BSK,
            window=spec.window,
            max_segments=self.max_segments if ids_BS is not None else None,
            aligned=not self.dealt,
        )

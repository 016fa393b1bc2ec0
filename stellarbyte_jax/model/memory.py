"""Segment memory: states of earlier tokens, which go into the model as an argument and come back as a result.

R layers of one kind, B batch, T tokens of a segment, F fused slots, M sliding slots, D model.
"""

from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.cache import pattern


@struct.dataclass
class Memory:
    """Inputs of each layer for earlier tokens of each row's document, without gradients.

    A layer of memory length n has ``M = round(sliding_share n)`` slots with the newest states, oldest first, and before
    them ``F = n - M`` fused slots. What leaves the sliding slots is cut into F equal groups, whose means are fused into
    the slots, ``w old + (1 - w) mean`` with the weight ``w = fusion_weight``. Every token sees the M tokens before it,
    whether they stand in its segment or in memory, and all fused slots.

    Dai et al. 2019 (Transformer-XL), https://arxiv.org/abs/1901.02860, with the same length for every token; fused
    slots as in Rae et al. 2019 (compressive transformer), https://arxiv.org/abs/1911.05507, with mean pooling.

    Attributes:
      states: for each kind of the layer pattern [R, B, F + M, D] in the compute dtype.
      valid: for each kind which slots hold something, bool [B, F + M].
      lengths: tokens of the current document so far, int32 [B].
    """

    states: tuple[jax.Array, ...]
    valid: tuple[jax.Array, ...]
    lengths: jax.Array

    @classmethod
    def create(cls, config: ByteConfig, batch_size: int) -> Self:
        """An empty memory."""
        kinds = pattern(config)
        layers = config.num_hidden_layers // len(kinds)
        sizes = [kind.fused + kind.sliding for kind in kinds]
        return cls(
            tuple(jnp.zeros((layers, batch_size, n, config.hidden_size), config.compute_dtype) for n in sizes),
            tuple(jnp.zeros((batch_size, n), bool) for n in sizes),
            jnp.zeros(batch_size, jnp.int32),
        )

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(x.nbytes for x in self.states)

    def continued(self, rows_B: jax.Array) -> Self:
        """The memory as segments see it: empty for rows (bool [B]) that do not continue their document."""
        valid = tuple(v & rows_B[:, None] for v in self.valid)
        return self.replace(valid=valid, lengths=jnp.where(rows_B, self.lengths, 0))  # type: ignore[attr-defined]

    def update(
        self, config: ByteConfig, states: Sequence[jax.Array | None], segment_ids_BT: jax.Array | None, T: int
    ) -> Self:
        """The memory after a segment whose layer inputs are ``states``, for each kind [R, B, T, D].

        Only tokens of the document at a row's end are remembered. Padding (id 0) must stand at the right.
        """
        B = self.batch_size
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        count_B = jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
        last_B1 = jnp.take_along_axis(segment_ids_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)
        current_BT = (segment_ids_BT == last_B1) & (segment_ids_BT > 0)
        whole_B = jnp.sum(current_BT, axis=1) == count_B
        lengths = jnp.where(whole_B, self.lengths, 0) + jnp.sum(current_BT, axis=1, dtype=jnp.int32)
        updated, valid = [], []
        for kind, old, old_valid, new in zip(pattern(config), self.states, self.valid, states, strict=True):
            F, M = kind.fused, kind.sliding
            if new is None:
                updated.append(old)
                valid.append(old_valid)
                continue
            new = jax.lax.stop_gradient(new)
            joined = jnp.concatenate([old[:, :, F:], new], axis=2)
            joined_valid = jnp.concatenate([old_valid[:, F:] & whole_B[:, None], current_BT], axis=1)
            newest_BM = count_B[:, None] + jnp.arange(M, dtype=jnp.int32)[None, :]
            sliding = jnp.take_along_axis(joined, newest_BM[None, :, :, None], axis=2)
            kept, kept_valid = [sliding], [jnp.take_along_axis(joined_valid, newest_BM, axis=1)]
            if F:
                index_1I = jnp.arange(M + T, dtype=jnp.int32)[None, :]
                leaves_BI = (index_1I < count_B[:, None]) & joined_valid
                group_BI = index_1I * F // jnp.maximum(count_B[:, None], 1)
                member_BFI = leaves_BI[:, None] & (group_BI[:, None] == jnp.arange(F, dtype=jnp.int32)[None, :, None])
                size_BF = jnp.sum(member_BFI, axis=2)
                share_BFI = member_BFI.astype(jnp.float32) / jnp.maximum(size_BF, 1).astype(jnp.float32)[:, :, None]
                mean = jnp.einsum("BFI,RBID->RBFD", share_BFI, joined.astype(jnp.float32))
                before_BF = old_valid[:, :F] & whole_B[:, None]
                weight_BF = jnp.where(before_BF, config.memory.fusion_weight, 0.0)[None, :, :, None]
                fused = weight_BF * old[:, :, :F].astype(jnp.float32) + (1 - weight_BF) * mean
                fused = jnp.where((size_BF > 0)[None, :, :, None], fused.astype(old.dtype), old[:, :, :F])
                kept, kept_valid = [fused, sliding], [before_BF | (size_BF > 0), *kept_valid]
            updated.append(jnp.concatenate(kept, axis=2))
            valid.append(jnp.concatenate(kept_valid, axis=1))
        return self.replace(states=tuple(updated), valid=tuple(valid), lengths=lengths)  # type: ignore[attr-defined]

    def select(self, rows: jax.Array | Sequence[int]) -> Self:
        """The memory of these rows, in this order."""
        rows_B = jnp.asarray(rows, jnp.int32)
        return type(self)(
            tuple(jnp.take(x, rows_B, axis=1) for x in self.states),
            tuple(jnp.take(v, rows_B, axis=0) for v in self.valid),
            jnp.take(self.lengths, rows_B),
        )

    def split(self, parts: int) -> Self:
        """The rows cut into equal parts, on a new first axis."""
        rows = self.batch_size // parts
        return type(self)(
            tuple(jnp.moveaxis(x.reshape(x.shape[0], parts, rows, *x.shape[2:]), 1, 0) for x in self.states),
            tuple(v.reshape(parts, rows, v.shape[1]) for v in self.valid),
            self.lengths.reshape(parts, rows),
        )

    def joined(self) -> Self:
        """Undoes :meth:`split`."""
        return type(self)(
            tuple(
                jnp.moveaxis(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:]) for x in self.states
            ),
            tuple(v.reshape(v.shape[0] * v.shape[1], v.shape[2]) for v in self.valid),
            self.lengths.reshape(-1),
        )

    def fit(self, batch_size: int, policy: str) -> Self:
        """The memory for a batch of another size.

        ``"strict"`` refuses; ``"select"`` takes the first rows, and begins again with the first where there are too
        few; ``"repeat"`` gives each row as many neighbouring copies, so that beams or samples of one prompt share it.

        Raises:
          ValueError: the policy is "strict" and the sizes differ, or "repeat" and the size is no multiple.
        """
        have = self.batch_size
        if have == batch_size:
            return self
        if policy == "select":
            return self.select([row % have for row in range(batch_size)])
        if policy == "repeat" and batch_size % have == 0:
            return self.select([row * have // batch_size for row in range(batch_size)])
        if policy == "repeat":
            raise ValueError(f"memory of {have} rows cannot be repeated for {batch_size}: that is no multiple")
        raise ValueError(
            f"memory has {have} rows, the batch {batch_size}: pass rows of the same documents, choose them with "
            "memory.select(rows), or set model.memory.batch_policy to select or repeat"
        )

    def reset(self, rows_B: jax.Array | None = None) -> Self:
        """The memory with these rows (bool [B]; all of them where not given) empty."""
        forgotten_B = jnp.ones(self.batch_size, bool) if rows_B is None else rows_B
        return self.continued(~forgotten_B)

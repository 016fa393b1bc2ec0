"""Segment memory: states of earlier tokens, which go into the model as an argument and come back as a result.

R layers of a stack, B batch, T tokens of a segment, C compressed slots, M all slots of a layer, D model.
"""

from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from stellarbyte_jax.config import ByteConfig


@struct.dataclass
class LayerMemory:
    """The memory of one layer, or of a stack of layers.

    Attributes:
      states: [B, M, D] in the compute dtype; of a stack [R, B, M, D].
      valid_BM: which slots hold something, bool; the same in every layer of a stack.
    """

    states: Array
    valid_BM: Array


@struct.dataclass
class Memory:
    """Inputs of each layer for earlier tokens of each row's document, without gradients.

    A layer of memory length n has ``round(recent_share n)`` recent slots with the newest states, oldest first, and
    before them C compressed slots. What leaves the recent slots is cut into C equal groups, whose means are added to
    the compressed slots, ``w old + (1 - w) mean`` with the weight ``w = compression_weight``. Every token sees as many
    tokens before it as there are recent slots, whether they are in its segment or in memory, and all compressed slots.

    Dai et al. 2019 (Transformer-XL), https://arxiv.org/abs/1901.02860, with the same length for every token; compressed
    slots as in Rae et al. 2019 (compressive transformer), https://arxiv.org/abs/1911.05507, with mean pooling.

    Attributes:
      groups: for each layer group the memories of the places of its period; of 0 slots where a layer has none.
      lengths_B: tokens of the current document so far, int32 [B].
    """

    groups: tuple[tuple[LayerMemory, ...], ...]
    lengths_B: Array

    @classmethod
    def create(cls, config: ByteConfig, batch_size: int) -> Self:
        """An empty memory."""
        groups = []
        for group in config.layer_groups:
            places = []
            for spec, layers in zip(group.period, group.layers_of_places, strict=True):
                shape = (layers, batch_size, spec.memory_slots, config.hidden_size)
                places.append(LayerMemory(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape[1:3], bool)))
            groups.append(tuple(places))
        return cls(tuple(groups), jnp.zeros(batch_size, jnp.int32))

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.lengths_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(place.states.nbytes for places in self.groups for place in places)

    @property
    def slots(self) -> tuple[int, ...]:
        """M of each place of each group."""
        return tuple(place.valid_BM.shape[1] for places in self.groups for place in places)

    def reset_new_documents(self, continues_B: Bool[Array, " B"]) -> Self:
        """The memory with the rows empty that do not continue their document."""
        return self._each(
            lambda place: LayerMemory(place.states, place.valid_BM & continues_B[:, None]),
            jnp.where(continues_B, self.lengths_B, 0),
        )

    def update(
        self,
        config: ByteConfig,
        inputs: Sequence[Sequence[Float[Array, "_ B T D"] | None]],
        segment_ids_BT: Int[Array, "B T"] | None,
        T: int,
    ) -> Self:
        """The memory after a segment of T tokens with these layer inputs, by group and place.

        Only tokens of the document at a row's end are remembered. Padding (id 0) must stand at the right.
        """
        B = self.batch_size
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        count_B = jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
        last_B1 = jnp.take_along_axis(segment_ids_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)
        current_BT = (segment_ids_BT == last_B1) & (segment_ids_BT > 0)
        continues_B = jnp.sum(current_BT, axis=1) == count_B
        lengths_B = jnp.where(continues_B, self.lengths_B, 0) + jnp.sum(current_BT, axis=1, dtype=jnp.int32)
        weight = config.memory.compression_weight
        groups = []
        for group, places, group_inputs in zip(config.layer_groups, self.groups, inputs, strict=True):
            groups.append(
                tuple(
                    place if new is None else _shifted(place, new, spec.compressed, weight, current_BT, continues_B)
                    for spec, place, new in zip(group.period, places, group_inputs, strict=True)
                )
            )
        return self.replace(groups=tuple(groups), lengths_B=lengths_B)  # type: ignore[attr-defined]

    def select(self, rows: Array | Sequence[int]) -> Self:
        """The memory of these rows, in this order.

        Raises:
          ValueError: there is no such row.
        """
        rows_B = checked_rows(rows, self.batch_size)
        return self._each(
            lambda place: LayerMemory(jnp.take(place.states, rows_B, axis=1), jnp.take(place.valid_BM, rows_B, axis=0)),
            jnp.take(self.lengths_B, rows_B),
        )

    def split(self, parts: int) -> Self:
        """The rows dealt out to equal parts, on a new first axis: part p has the rows p, p + parts, and so on."""
        rows = self.batch_size // parts

        def cut(place: LayerMemory) -> LayerMemory:
            states, valid = place.states, place.valid_BM
            states = states.reshape(states.shape[0], rows, parts, *states.shape[2:])
            return LayerMemory(jnp.moveaxis(states, 2, 0), jnp.swapaxes(valid.reshape(rows, parts, -1), 0, 1))

        return self._each(cut, self.lengths_B.reshape(rows, parts).T)

    def joined(self) -> Self:
        """Undoes :meth:`split`."""

        def join(place: LayerMemory) -> LayerMemory:
            states, valid = jnp.moveaxis(place.states, 0, 2), jnp.swapaxes(place.valid_BM, 0, 1)
            states = states.reshape(states.shape[0], states.shape[1] * states.shape[2], *states.shape[3:])
            return LayerMemory(states, valid.reshape(valid.shape[0] * valid.shape[1], valid.shape[2]))

        return self._each(join, self.lengths_B.T.reshape(-1))

    def by_axes(self, of: Callable[[tuple[str | None, ...], Array], Array]) -> Self:
        """A memory of what ``of`` makes of the logical axes of each array, and the array."""
        groups = tuple(
            tuple(
                LayerMemory(of(("layers", "batch", None, None), place.states), of(("batch", None), place.valid_BM))
                for place in places
            )
            for places in self.groups
        )
        return self.replace(groups=groups, lengths_B=of(("batch",), self.lengths_B))  # type: ignore[attr-defined]

    def match_batch(self, batch_size: int, policy: str) -> Self:
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

    def reset(self, rows_B: Bool[Array, " B"] | None = None) -> Self:
        """The memory with these rows (all of them where not given) empty."""
        emptied_B = jnp.ones(self.batch_size, bool) if rows_B is None else rows_B
        return self.reset_new_documents(~emptied_B)

    def _each(self, change: Callable[[LayerMemory], LayerMemory], lengths_B: Array) -> Self:
        groups = tuple(tuple(change(place) for place in places) for places in self.groups)
        return self.replace(groups=groups, lengths_B=lengths_B)  # type: ignore[attr-defined]


def checked_rows(rows: Array | Sequence[int], have: int) -> Int[Array, " B"]:
    """Numbers of rows as an array; ValueError where their values are known and one is not below ``have``."""
    if not isinstance(rows, Tracer):
        wrong = [int(row) for row in rows if not 0 <= row < have]
        if wrong:
            raise ValueError(f"there is no row {wrong[0]}: the rows are 0 to {have - 1}")
    return jnp.asarray(rows, jnp.int32)


def with_memory_prefix(indices_BT: Int[Array, "B T"], M: int) -> Int[Array, "B S"]:
    """Positions, or indices in the row, of M memory slots and of the new tokens behind them."""
    before_BM = indices_BT[:, :1] - M + jnp.arange(M, dtype=jnp.int32)[None, :]
    return jnp.concatenate([before_BM, indices_BT], axis=1)


def _shifted(
    memory: LayerMemory,
    new_RBTD: Array,
    C: int,
    weight: float,
    current_BT: Bool[Array, "B T"],
    continues_B: Bool[Array, " B"],
) -> LayerMemory:
    """The memory of a stack after a segment, of whose tokens those in ``current_BT`` are to be remembered."""
    old_RBMD, old_valid_BM = memory.states, memory.valid_BM
    recent = old_valid_BM.shape[1] - C
    T = current_BT.shape[1]
    # The last of the current document's tokens is the last that is no padding.
    count_B = jnp.max(jnp.where(current_BT, jnp.arange(1, T + 1, dtype=jnp.int32)[None, :], 0), axis=1)
    new_RBTD = jax.lax.stop_gradient(new_RBTD)
    joined_RBID = jnp.concatenate([old_RBMD[:, :, C:], new_RBTD], axis=2)
    valid_BI = jnp.concatenate([old_valid_BM[:, C:] & continues_B[:, None], current_BT], axis=1)
    newest_BM = count_B[:, None] + jnp.arange(recent, dtype=jnp.int32)[None, :]
    recent_RBMD = jnp.take_along_axis(joined_RBID, newest_BM[None, :, :, None], axis=2)
    recent_valid_BM = jnp.take_along_axis(valid_BI, newest_BM, axis=1)
    if not C:
        return LayerMemory(recent_RBMD, recent_valid_BM)
    index_1I = jnp.arange(recent + T, dtype=jnp.int32)[None, :]
    leaves_BI = (index_1I < count_B[:, None]) & valid_BI
    group_BI = index_1I * C // jnp.maximum(count_B[:, None], 1)
    member_BCI = leaves_BI[:, None] & (group_BI[:, None] == jnp.arange(C, dtype=jnp.int32)[None, :, None])
    size_BC = jnp.sum(member_BCI, axis=2)
    share_BCI = member_BCI.astype(jnp.float32) / jnp.maximum(size_BC, 1).astype(jnp.float32)[:, :, None]
    mean_RBCD = jnp.einsum("BCI,RBID->RBCD", share_BCI, joined_RBID.astype(jnp.float32))
    before_BC = old_valid_BM[:, :C] & continues_B[:, None]
    weight_BC = jnp.where(before_BC, weight, 0.0)[None, :, :, None]
    compressed_RBCD = weight_BC * old_RBMD[:, :, :C].astype(jnp.float32) + (1 - weight_BC) * mean_RBCD
    changed_BC = (size_BC > 0)[None, :, :, None]
    compressed_RBCD = jnp.where(changed_BC, compressed_RBCD.astype(old_RBMD.dtype), old_RBMD[:, :, :C])
    return LayerMemory(
        jnp.concatenate([compressed_RBCD, recent_RBMD], axis=2),
        jnp.concatenate([before_BC | (size_BC > 0), recent_valid_BM], axis=1),
    )

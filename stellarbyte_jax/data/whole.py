"""Conversations to full rows, each of them whole: as many as fit beside each other.

Suffixes: B rows, T positions.
"""

from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from stellarbyte_jax.data.batches import BatchIterator, DocumentBatches, batch_arrays
from stellarbyte_jax.data.encode import iterate_groups

_WAITING = 64  # conversations among which the next one of a row is looked for


class WholeConversations(DocumentBatches):
    """Batches of rows with whole conversations; see ``batches.batch_arrays``.

    A row takes, of the 64 conversations that wait longest, again and again the first that fits, so that shares of a
    mixture hold in every stretch. The rest of it is padding. The last batch is filled up with padding rows.

    The loss is that of replies, and of what is none where ``prompts`` is true. Batches have ``replies`` int32 [B, T]
    besides: of each token the number of the reply that it belongs to, 0 for none, -1 for one that is not learnt.

    The state is the place of the next conversation and those of the ones that wait. Batches depend on nothing else, so
    a state fits any number of workers and of rows.
    """

    def __init__(self, groups: grain.MapDataset, *, prompts: bool = False, **shape: Any):
        """``prompts`` says whether tokens that are no reply's are in the loss; ``shape`` is of ``DocumentBatches``."""
        super().__init__(groups, **shape)
        self.prompts = prompts

    def __iter__(self) -> "WholeIterator":
        """A new iterator at the first conversation."""
        return WholeIterator(self)


@dataclass
class _Waiting:
    """A conversation, named by its group and its place there."""

    group: int
    number: int
    tokens: np.ndarray
    replies: np.ndarray


class WholeIterator(BatchIterator):
    """The iterator of ``WholeConversations``."""

    def __init__(self, dataset: WholeConversations):
        """Begins at the first conversation."""
        super().__init__(dataset)
        self._prompts = dataset.prompts
        self.set_state({"group": 0, "number": 0, "skipped": 0, "shortened": 0, "left_out": 0, "waiting": []})

    def get_state(self) -> dict[str, Any]:
        """The next conversation, those that wait ([group, number]), and how many were left out or shortened."""
        waiting = [*map(list, self._unread), *([one.group, one.number] for one in self._waiting)]
        if self._next == len(self._group):
            return {"group": self._next_group, "number": self._skip, **self._counts(), "waiting": waiting}
        return {"group": self._next_group - 1, "number": self._next, **self._before, "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that ``get_state`` gave."""
        self._go_to(state["group"], state["skipped"])
        self._shortened, self._left_out = state["shortened"], state["left_out"]
        self._skip = state["number"]  # conversations of the next group that were taken
        self._unread = [tuple(place) for place in state["waiting"]]
        self._waiting: list[_Waiting] = []
        self._group: list[_Waiting] = []
        self._next = 0
        self._before = self._counts()

    def _counts(self) -> dict[str, int]:
        return {"skipped": self._skipped, "shortened": self._shortened, "left_out": self._left_out}

    def _make_batch(self) -> dict[str, np.ndarray] | None:
        dataset = self._dataset
        rows, length = dataset.batch_size, dataset.sequence_length
        tokens_BT = np.full((rows, length), dataset.pad, np.int32)
        replies_BT = np.zeros((rows, length), np.int32)
        begins_BT = np.zeros((rows, length), bool)
        used_B = np.zeros(rows, np.int64)
        self._reopen()
        for row in range(rows):
            for _ in range(dataset.max_documents):
                one = self._take(length - used_B[row])
                if one is None:
                    break
                begin, end = used_B[row], used_B[row] + len(one.tokens)
                tokens_BT[row, begin:end], replies_BT[row, begin:end] = one.tokens, one.replies
                begins_BT[row, begin] = True
                used_B[row] = end
        if not used_B.any():
            return None
        batch = batch_arrays(tokens_BT, begins_BT, used_B, np.zeros(rows, np.int64))
        batch["loss_mask"] &= replies_BT >= (0 if self._prompts else 1)
        return {**batch, "replies": replies_BT}

    def _take(self, room: int) -> _Waiting | None:
        """The next conversation of a row with so much room; None where none fits."""
        while len(self._waiting) < _WAITING and (one := self._read_on()) is not None:
            self._waiting.append(one)
        fitting = (number for number, one in enumerate(self._waiting) if len(one.tokens) <= room)
        number = next(fitting, None)
        return None if number is None else self._waiting.pop(number)

    def _read_on(self) -> _Waiting | None:
        """The next conversation that is not left out, None where there is none."""
        while True:
            if self._next == len(self._group):
                self._before = self._counts()
                group = self._pull()
                if group is None:
                    return None
                self._shortened += group["shortened"]
                self._left_out += group["left_out"]
                self._group = self._of_group(self._next_group - 1, group)
                self._next, self._skip = self._skip, 0
                continue
            one = self._group[self._next]
            self._next += 1
            if len(one.tokens):
                return one

    def _reopen(self) -> None:
        """Reads the conversations that wait in a state."""
        unread, self._unread = self._unread, []
        groups: dict[int, list[_Waiting]] = {}
        for number in sorted({group for group, _ in unread}):
            source = iterate_groups(self._dataset.groups[number : number + 1], 0)
            groups[number] = self._of_group(number, next(source))
            source.close()
        self._waiting = [groups[group][number] for group, number in unread] + self._waiting

    @staticmethod
    def _of_group(number: int, group: dict[str, Any]) -> list[_Waiting]:
        ends = np.cumsum(group["lengths"])
        return [
            # Copies: a view would keep the whole group as long as one of it waits.
            _Waiting(number, n, group["tokens"][end - size : end].copy(), group["replies"][end - size : end].copy())
            for n, (end, size) in enumerate(zip(ends, group["lengths"], strict=True))
        ]

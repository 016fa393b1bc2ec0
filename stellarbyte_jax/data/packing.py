"""Documents of any length to full rows: concatenate, split, and mark who belongs together.

Suffixes: B rows, T positions.
"""

import bisect

import numpy as np

from stellarbyte_jax.data.batches import BatchIterator, DocumentBatches, batch_arrays


class PackDocuments(DocumentBatches):
    """Batches of rows cut from the stream of all documents, joined end to end; see ``batches.batch_arrays``.

    A document that a row's end cuts goes on in the next row as a new segment, whose positions begin at 0. A row ends
    early, with padding, where one more document would exceed ``max_documents``. The last batch is filled up with
    padding rows, so that no document is lost.

    The state is the place of the next token in the stream: a group's number and an offset in it. Batches depend on
    nothing else, so any state fits any number of workers, batch size and sequence length.
    """

    def __iter__(self) -> "PackIterator":
        """A new iterator at the first document."""
        return PackIterator(self)


class PackIterator(BatchIterator):
    """The iterator of ``PackDocuments``."""

    def __init__(self, dataset: PackDocuments):
        """Begins at the first document."""
        super().__init__(dataset)
        self.set_state({"group": 0, "offset": 0, "skipped": 0})

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins, and how many lines were left out before."""
        if self._cursor == len(self._tokens):
            return {"group": self._next_group, "offset": self._drop, "skipped": self._skipped}
        group, begin, skipped = self._held[bisect.bisect_right(self._held, self._cursor, key=lambda h: h[1]) - 1]
        return {"group": group, "offset": self._cursor - begin, "skipped": skipped}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a place that ``get_state`` gave."""
        self._go_to(state["group"], state["skipped"])
        self._drop = state["offset"]  # tokens of the next group that are already used
        self._tokens = np.zeros(0, np.int32)
        self._starts = np.zeros(0, np.int64)  # where documents begin in self._tokens
        self._held: list[tuple[int, int, int]] = []  # (group, where it begins in self._tokens, skipped before it)
        self._cursor = 0

    def _fill(self) -> None:
        """Holds enough tokens for a row, or all that are left."""
        length = self._dataset.sequence_length
        have = len(self._tokens) - self._cursor
        if have >= length or self._exhausted:
            return
        tokens = [self._tokens[self._cursor :]]
        starts = [self._starts[self._starts >= self._cursor] - self._cursor]
        held = [(group, begin - self._cursor, skipped) for group, begin, skipped in self._held]
        current = bisect.bisect_right(held, 0, key=lambda h: h[1]) - 1
        self._held = held[max(current, 0) :] if have else []
        while have < length:
            number, skipped = self._next_group, self._skipped
            group = self._pull()
            if group is None:
                break
            ends = np.cumsum(group["lengths"])
            begins = ends - group["lengths"] - self._drop
            self._held.append((number, have - self._drop, skipped))
            tokens.append(group["tokens"][self._drop :])
            starts.append(begins[begins >= 0] + have)
            have += len(tokens[-1])
            self._drop = 0
        self._tokens, self._starts, self._cursor = np.concatenate(tokens), np.concatenate(starts), 0

    def _make_batch(self) -> dict[str, np.ndarray] | None:
        rows, length = self._dataset.batch_size, self._dataset.sequence_length
        tokens_BT = np.full((rows, length), self._dataset.pad, np.int32)
        begins_BT = np.zeros((rows, length), bool)
        used_B = np.zeros(rows, np.int64)
        for row in range(rows):
            self._fill()
            begin = self._cursor
            first = int(np.searchsorted(self._starts, begin, side="right"))
            too_many = first + self._dataset.max_documents - 1
            end = min(begin + length, len(self._tokens))
            if too_many < len(self._starts):
                end = min(end, int(self._starts[too_many]))
            if end == begin:
                break
            tokens_BT[row, : end - begin] = self._tokens[begin:end]
            inside = self._starts[first : min(too_many, len(self._starts))]
            begins_BT[row, inside[inside < end] - begin] = True
            begins_BT[row, 0] = True
            used_B[row] = end - begin
            self._cursor = end
        if not used_B[0]:
            return None
        return batch_arrays(tokens_BT, begins_BT, used_B, np.zeros(rows, np.int64))

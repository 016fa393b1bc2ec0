"""Documents to rows that continue each other from batch to batch, for models that remember.

Suffixes: B rows, T positions.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from stellarbyte_jax.data.batches import BatchIterator, DocumentBatches, batch_arrays
from stellarbyte_jax.data.encode import iterate_groups
from stellarbyte_jax.data.sources import DataError


class ContiguousDocuments(DocumentBatches):
    """Batches whose row b goes on exactly where row b of the batch before ended; see ``batches.batch_arrays``.

    A row follows one document to its end, over as many batches as it takes, and then takes the next one that no row has
    taken yet, rows in order. ``positions`` count from the document's start, so that a row that continues one begins
    with a position above 0. A row ends early, with padding, where one more document would exceed ``max_documents``;
    the next batch's row then begins with another document. When there are no more documents, the rows run out one by
    one and are padded.

    The state is the place of each row in its document and the next document. Batches depend on nothing else, so a state
    fits any number of workers and any sequence length, but only the number of rows that it was taken with.
    """

    def __iter__(self) -> "ContiguousIterator":
        """A new iterator at the first document."""
        return ContiguousIterator(self)


@dataclass
class _Reading:
    """Where one row is: a document, named by its group and its place there, and how much of it is used."""

    group: int
    document: int
    offset: int
    tokens: np.ndarray | None  # of the whole document; None: not read yet since the state was set


class ContiguousIterator(BatchIterator):
    """The iterator of ``ContiguousDocuments``."""

    def __init__(self, dataset: ContiguousDocuments):
        """Begins at the first document."""
        super().__init__(dataset)
        self.set_state({"group": 0, "document": 0, "skipped": 0, "rows": [None] * dataset.batch_size})

    def get_state(self) -> dict[str, Any]:
        """Where each row goes on ([group, document, offset]; None: with the next document), and the next document."""
        rows = [None if r is None else [r.group, r.document, r.offset] for r in self._rows]
        if self._next_document == len(self._lengths):
            place = {"group": self._next_group, "document": self._drop, "skipped": self._skipped}
        else:
            place = {
                "group": self._next_group - 1,
                "document": self._next_document,
                "skipped": self._skipped_before,
            }
        return {**place, "rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that ``get_state`` gave.

        Raises:
          DataError: it is of another number of rows.
        """
        rows = state["rows"]
        if len(rows) != self._dataset.batch_size:
            raise DataError(
                f"cannot continue the data where it stopped: {len(rows)} rows followed their documents, now there are "
                f"{self._dataset.batch_size}; keep the batch size as it was, or start a new run"
            )
        self._go_to(state["group"], state["skipped"])
        self._drop = state["document"]  # documents of the next group that are already taken
        self._rows = [None if place is None else _Reading(*place, tokens=None) for place in rows]
        self._tokens = np.zeros(0, np.int32)
        self._lengths = np.zeros(0, np.int64)  # of the documents in self._tokens
        self._ends = self._lengths
        self._next_document = 0
        self._skipped_before = self._skipped

    def _make_batch(self) -> dict[str, np.ndarray] | None:
        rows, length = self._dataset.batch_size, self._dataset.sequence_length
        self._reopen()
        tokens_BT = np.full((rows, length), self._dataset.pad, np.int32)
        begins_BT = np.zeros((rows, length), bool)
        used_B = np.zeros(rows, np.int64)
        offsets_B = np.array([0 if reading is None else reading.offset for reading in self._rows], np.int64)
        for row in range(rows):
            documents = used = 0
            while used < length and documents < self._dataset.max_documents:
                reading = self._rows[row] or self._take()
                if reading is None:
                    break
                assert reading.tokens is not None
                part = reading.tokens[reading.offset : reading.offset + length - used]
                tokens_BT[row, used : used + len(part)] = part
                begins_BT[row, used] = True
                used += len(part)
                documents += 1
                reading.offset += len(part)
                self._rows[row] = reading if reading.offset < len(reading.tokens) else None
            used_B[row] = used
        if not used_B.any():
            return None
        return batch_arrays(tokens_BT, begins_BT, used_B, offsets_B)

    def _take(self) -> _Reading | None:
        """The next document that is not empty, None where there is none."""
        while True:
            while self._next_document == len(self._lengths):
                self._skipped_before = self._skipped
                group = self._pull()
                if group is None:
                    return None
                self._tokens, self._lengths = group["tokens"], group["lengths"]
                self._ends = np.cumsum(self._lengths)
                self._next_document, self._drop = self._drop, 0
            number = self._next_document
            self._next_document += 1
            if self._lengths[number]:
                return _Reading(self._next_group - 1, number, 0, self._document(self._tokens, self._ends, number))

    def _reopen(self) -> None:
        """Reads the documents that the rows of a state are in."""
        unread = [reading for reading in self._rows if reading is not None and reading.tokens is None]
        for number in sorted({reading.group for reading in unread}):
            with contextlib.closing(iterate_groups(self._dataset.groups[number : number + 1], 0)) as groups:
                group = next(groups)
            ends = np.cumsum(group["lengths"])
            for reading in unread:
                if reading.group == number:
                    reading.tokens = self._document(group["tokens"], ends, reading.document)

    def _document(self, tokens: np.ndarray, ends: np.ndarray, number: int) -> np.ndarray:
        """The tokens of a document of a group; a long one that other rows read, of other epochs, is held once."""
        part = tokens[ends[number - 1] if number else 0 : ends[number]]
        if len(part) > self._dataset.sequence_length:
            for reading in self._rows:
                if reading is not None and reading.tokens is not None and np.array_equal(reading.tokens, part):
                    return reading.tokens
        # A copy: a view would keep the whole group as long as the document is read.
        return part.copy()

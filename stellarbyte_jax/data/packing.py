"""Documents of any length to full rows: concatenate, split, and mark who belongs together.

Suffixes: B rows, T positions.
"""

import bisect
from typing import Any

import grain
import numpy as np

from stellarbyte_jax.data.sources import DataError
from stellarbyte_jax.data.text import iterate_groups, signals_blocked


class PackDocuments(grain.IterDataset):
    """Batches of rows cut from the stream of all documents, joined end to end.

    Each batch holds arrays [B, T]: ``tokens`` int32; ``segment_ids`` int32, 1, 2, ... per document in the row and 0
    for padding; ``positions`` int32, from 0 in each segment; ``loss_mask`` bool, False on padding and on the first
    token of a segment, which nothing predicts: its sum is the number of targets.

    A document that a row's end cuts goes on in the next row as a new segment. A row ends early, with padding, where
    one more document would exceed ``max_documents``. The last batch is filled up with padding rows, so that no
    document is lost.

    The state is the place of the next token in the stream: a group's number and an offset in it. Batches depend on
    nothing else, so any state fits any number of workers, batch size and sequence length.
    """

    def __init__(
        self,
        groups: grain.MapDataset,
        *,
        batch_size: int,
        sequence_length: int,
        max_documents: int,
        pad: int,
        workers: int = 0,
        epoch_groups: int = 0,
    ):
        """Cuts the groups that ``text.EncodeDocuments`` makes.

        Args:
          groups: dataset of groups with ``tokens``, ``lengths`` and ``skipped``.
          batch_size: rows, B.
          sequence_length: tokens of a row, T.
          max_documents: largest number of segments in a row.
          pad: token id of padding.
          workers: processes that make the groups; 0: the thread that iterates.
          epoch_groups: groups of one pass; as many without a single token are an error, not an endless wait.
        """
        super().__init__()
        self.groups = groups
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.max_documents = max_documents
        self.pad = pad
        self.workers = workers
        self.epoch_groups = epoch_groups

    def __iter__(self) -> "PackIterator":
        """A new iterator at the first document."""
        return PackIterator(self)


class PackIterator(grain.DatasetIterator):
    """The iterator of ``PackDocuments``."""

    def __init__(self, dataset: PackDocuments):
        """Begins at the first document; workers start with the first batch."""
        super().__init__()
        self._dataset = dataset
        self._source: Any = None
        self.set_state({"group": 0, "offset": 0, "skipped": 0})

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins, and how many lines were left out before."""
        if self._cursor == len(self._tokens):
            return {"group": self._next_group, "offset": self._drop, "skipped": self._skipped}
        group, begin, skipped = self._held[bisect.bisect_right(self._held, self._cursor, key=lambda h: h[1]) - 1]
        return {"group": group, "offset": self._cursor - begin, "skipped": skipped}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a place that ``get_state`` gave."""
        self._stop_source()
        self._failure: Exception | None = None
        self._exhausted = False
        self._next_group = state["group"]
        self._drop = state["offset"]  # tokens of the next group that are already used
        self._skipped = state["skipped"]
        self._tokens = np.zeros(0, np.int32)
        self._starts = np.zeros(0, np.int64)  # where documents begin in self._tokens
        self._held: list[tuple[int, int, int]] = []  # (group, where it begins in self._tokens, skipped before it)
        self._cursor = 0
        self._empty_groups = 0

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch. An error ends the iteration and is raised again by every later call."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._pack()
        except StopIteration:
            self._stop_source()
            raise
        except Exception as error:
            self._failure = error
            self._stop_source()
            raise

    def close(self) -> None:
        """Ends the worker processes."""
        self._closed = True
        self._stop_source()

    def _stop_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def _pull(self) -> dict[str, Any] | None:
        if self._source is None:
            groups = self._dataset.groups
            if self._next_group >= len(groups):
                return None
            with signals_blocked():
                self._source = iterate_groups(groups[self._next_group :], self._dataset.workers)
                return next(self._source, None)
        return next(self._source, None)

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
            group = self._pull()
            if group is None:
                self._exhausted = True
                break
            ends = np.cumsum(group["lengths"])
            begins = ends - group["lengths"] - self._drop
            self._held.append((self._next_group, have - self._drop, self._skipped))
            tokens.append(group["tokens"][self._drop :])
            starts.append(begins[begins >= 0] + have)
            have += len(tokens[-1])
            self._drop = 0
            self._next_group += 1
            self._skipped += group["skipped"]
            self._empty_groups = 0 if len(group["tokens"]) else self._empty_groups + 1
            if self._empty_groups >= self._dataset.epoch_groups > 0:
                raise DataError("no document of the data holds any text: every line is empty or was skipped")
        self._tokens, self._starts, self._cursor = np.concatenate(tokens), np.concatenate(starts), 0

    def _pack(self) -> dict[str, np.ndarray]:
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
            raise StopIteration
        index_T = np.arange(length, dtype=np.int32)
        real_BT = index_T < used_B[:, None]
        segment_ids_BT = np.cumsum(begins_BT, axis=1, dtype=np.int32) * real_BT
        starts_BT = np.maximum.accumulate(np.where(begins_BT, index_T, np.int32(0)), axis=1)
        return {
            "tokens": tokens_BT,
            "segment_ids": segment_ids_BT,
            "positions": (index_T - starts_BT) * real_BT,
            "loss_mask": real_BT & ~begins_BT,
        }

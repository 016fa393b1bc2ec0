"""What all arrangements of documents in rows share: reading the documents in order, and the arrays of a batch.

Suffixes: B rows, T positions.
"""

import abc
from typing import Any

import grain
import numpy as np

from stellarbyte_jax.data.encode import iterate_groups
from stellarbyte_jax.data.sources import DataError


class DocumentBatches(grain.IterDataset):
    """Batches made of the groups that ``encode.EncodeDocuments`` makes; subclasses say how rows are filled."""

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
        """Names the groups and the shape of a batch.

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


class BatchIterator(grain.DatasetIterator):
    """An iterator over batches that can be put back to any place and is closed when no longer needed.

    A place is a dict of JSON values. In every arrangement ``group`` counts the groups gone through, and ``skipped`` the
    lines left out in them.
    """

    def __init__(self, dataset: DocumentBatches):
        """Workers start with the first batch. The subclass goes to its first place."""
        super().__init__()
        self._dataset = dataset
        self._source: Any = None

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch. An error ends the iteration and is raised again by every later call."""
        if self._failure is not None:
            raise self._failure
        try:
            batch = self._make_batch()
        except Exception as error:
            self._failure = error
            self._stop_source()
            raise
        if batch is None:
            self._stop_source()
            raise StopIteration
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._closed = True
        self._stop_source()

    @abc.abstractmethod
    def _make_batch(self) -> dict[str, np.ndarray] | None:
        """The next batch, None where nothing is left."""

    def _go_to(self, group: int, skipped: int) -> None:
        """Makes ``group`` the next one that is pulled, after ``skipped`` lines left out."""
        self._stop_source()
        self._failure: Exception | None = None
        self._exhausted = False
        self._next_group = group
        self._skipped = skipped
        self._empty_groups = 0

    def _pull(self) -> dict[str, Any] | None:
        """The next group, None where there is none."""
        group = None if self._exhausted else self._read()
        if group is None:
            self._exhausted = True
            return None
        self._next_group += 1
        self._skipped += group["skipped"]
        self._empty_groups = 0 if len(group["tokens"]) else self._empty_groups + 1
        if self._empty_groups >= self._dataset.epoch_groups > 0:
            raise DataError(
                "no document of the data holds any text: every line is empty, too long or was skipped; name other "
                "files, or raise data.sequence_length where conversations are too long, it is "
                f"{self._dataset.sequence_length}"
            )
        return group

    def _read(self) -> dict[str, Any] | None:
        if self._source is None:
            groups = self._dataset.groups
            if self._next_group >= len(groups):
                return None
            self._source = iterate_groups(groups[self._next_group :], self._dataset.workers)
        return next(self._source, None)

    def _stop_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None


def batch_arrays(
    tokens_BT: np.ndarray, begins_BT: np.ndarray, used_B: np.ndarray, offsets_B: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays [B, T] of a batch.

    Args:
      tokens_BT: int32, padding in place.
      begins_BT: bool, where segments begin.
      used_B: int, tokens of each row; what follows is padding.
      offsets_B: int, position of each row's first token in its document.

    Returns:
      ``tokens`` int32; ``segment_ids`` int32, 1, 2, ... per segment in the row and 0 for padding; ``positions`` int32,
      from 0 in each segment but a row's first, which begins at its offset; ``loss_mask`` bool, False on padding and on
      the first token of a segment, which nothing predicts: its sum is the number of targets.
    """
    index_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    valid_mask_BT = index_T < used_B[:, None]
    segment_ids_BT = np.cumsum(begins_BT, axis=1, dtype=np.int32) * valid_mask_BT
    starts_BT = np.maximum.accumulate(np.where(begins_BT, index_T, np.int32(0)), axis=1)
    before_BT = (segment_ids_BT == 1) * offsets_B[:, None].astype(np.int32)
    return {
        "tokens": tokens_BT,
        "segment_ids": segment_ids_BT,
        "positions": (index_T - starts_BT) * valid_mask_BT + before_BT,
        "loss_mask": valid_mask_BT & ~begins_BT,
    }

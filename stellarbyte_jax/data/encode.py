"""Documents to token ids, in worker processes."""

import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from stellarbyte_jax.data.sources import Corpus, ShardSource
from stellarbyte_jax.data.text import TextFormat, UnusableRecordError, read_text
from stellarbyte_jax.data.workers import Workers
from stellarbyte_jax.tokenizer.codec import load_tokenizer

# Documents that travel between processes together: enough to hide the cost of a message, few enough that a resume,
# which tokenises the group in hand again, is quick.
GROUP_DOCUMENTS = 32


@dataclass(frozen=True)
class EncodeDocuments:
    """Document numbers to one group: ``tokens`` int32 [n], ``lengths`` int64 [documents], ``skipped`` int.

    Documents without any text are left out, as blank lines are. The tokenizer travels to workers as a path.
    """

    corpus: Corpus
    text: TextFormat
    tokenizer: str
    bos: int | None  # None: not added
    eos: int | None
    on_error: Literal["raise", "skip"] = "raise"

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Reads and tokenises the documents.

        Raises:
          DataError: a record is unusable and ``on_error`` is "raise", or a file became shorter.
        """
        documents: list[Any] = []
        texts: list[str] = []
        text_at: list[int] = []
        skipped = 0
        for number in numbers:
            source, row = self.corpus.locate(number)
            if isinstance(source, ShardSource):
                documents.append(source.tokens(row))
                continue
            try:
                text = read_text(source, row, self.text)
            except UnusableRecordError:
                if self.on_error == "raise":
                    raise
                skipped += 1
                continue
            texts.append(text)
            text_at.append(len(documents))
            documents.append(None)
        if texts:
            tokenizer = _tokenizer(self.tokenizer)
            for at, ids in zip(text_at, tokenizer.encode_batch(texts), strict=True):
                documents[at] = np.array(ids, np.int32)
        documents = [ids for ids in documents if len(ids)]
        before = np.array([self.bos] if self.bos is not None else [], np.int32)
        after = np.array([self.eos] if self.eos is not None else [], np.int32)
        parts = [part for ids in documents for part in (before, ids, after)]
        tokens = np.concatenate(parts, dtype=np.int32, casting="same_kind") if parts else np.zeros(0, np.int32)
        lengths = np.array([len(ids) for ids in documents], np.int64) + (len(before) + len(after))
        return {"tokens": tokens, "lengths": lengths, "skipped": skipped}


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    return load_tokenizer(path)


def document_groups(
    count: int, *, seed: int | None = None, epochs: int | None = 1, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Groups of document numbers in reading order: a random access dataset of lists of ints.

    Args:
      count: how many documents there are.
      seed: of the shuffle, which differs from epoch to epoch; None: in order.
      epochs: how often each document comes; None: endless.
      process_index: every ``process_count``-th document from here belongs to this process.
      process_count: how many processes share the documents.
    """
    documents = grain.MapDataset.range(count)
    if seed is not None:
        documents = documents.shuffle(seed=seed % 2**32)
    if process_count > 1:
        documents = documents.repeat(epochs)[process_index::process_count]
        return documents.batch(GROUP_DOCUMENTS, batch_fn=list)
    # A group ends with its epoch, so that more epochs go on where fewer ended.
    return documents.batch(GROUP_DOCUMENTS, batch_fn=list).repeat(epochs)


def iterate_groups(groups: grain.MapDataset, workers: int) -> Workers | Generator[Any, None, None]:
    """Iterates over a dataset whose elements are made in ``workers`` processes (0: in this thread), in its order.

    The result's ``close()`` ends the workers; they end by themselves when this process dies.
    """
    workers = min(workers, len(groups))
    return Workers(_Groups(groups), workers) if workers else _in_this_thread(_Groups(groups))


def _in_this_thread(groups: Sequence[Any]) -> Generator[Any, None, None]:
    for number in range(len(groups)):
        yield groups[number]


class _Groups(Sequence[Any]):
    """A dataset of grain, set up for use in whatever process it is."""

    def __init__(self, groups: grain.MapDataset) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: Any) -> Any:
        # Grain reads command line flags of absl, which raise where a program does not use absl for its command line.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
            # Otherwise every thread that an error passes through adds a paragraph about hidden frames to it.
            grain.config.update("py_traceback_filtering", "off")
        return self._groups[number]

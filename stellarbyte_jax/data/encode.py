"""Documents to token ids, in worker processes."""

import functools
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

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
# A corpus of up to so many bytes of tokens stays encoded in each process that encodes it.
_KEPT_BYTES = 1 << 26
_OBJECT_BYTES = 256  # of an array and its entry, besides the tokens


class Sized(Protocol):
    """What knows its bytes, as an array does."""

    @property
    def nbytes(self) -> int:
        """How many."""
        ...


_Made = TypeVar("_Made", bound=Sized)


class Encoded(Generic[_Made]):
    """What this process made of documents, by number: of all while they fit, then of the last group.

    Contiguous rows take the few documents of a small corpus many times for one batch, of one epoch after the other.
    A copy that travels to another process is empty.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._kept: dict[int, _Made] = {}
        self._bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoded, ()

    def get(self, number: int) -> _Made | None:
        """What was made of a document; None where it is not kept."""
        return self._kept.get(number)

    def keep(self, group: Mapping[int, _Made]) -> None:
        """Keeps the documents of a group."""
        self._bytes += sum(ids.nbytes + _OBJECT_BYTES for number, ids in group.items() if number not in self._kept)
        if self._bytes <= _KEPT_BYTES:
            self._kept.update(group)
        else:  # and stays so: the sum does not shrink
            self._kept = dict(group)


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
    _encoded: Encoded[np.ndarray] = field(default_factory=Encoded, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _tokenizer.cache_clear()  # that of the same directory may have been trained again

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Reads the documents and tokenises those that are not at hand.

        Raises:
          DataError: a record is unusable and ``on_error`` is "raise", or a file became shorter.
        """
        found = self._tokens(dict.fromkeys(numbers))
        documents = [found[number] for number in numbers if number in found and len(found[number])]
        before = np.array([self.bos] if self.bos is not None else [], np.int32)
        after = np.array([self.eos] if self.eos is not None else [], np.int32)
        parts = [part for ids in documents for part in (before, ids, after)]
        tokens = np.concatenate(parts, dtype=np.int32, casting="same_kind") if parts else np.zeros(0, np.int32)
        lengths = np.array([len(ids) for ids in documents], np.int64) + (len(before) + len(after))
        return {"tokens": tokens, "lengths": lengths, "skipped": sum(number not in found for number in numbers)}

    def _tokens(self, numbers: Iterable[int]) -> dict[int, np.ndarray]:
        """The tokens of documents, each named once, without those that are unusable and skipped."""
        found: dict[int, np.ndarray] = {}
        encoded: dict[int, np.ndarray] = {}
        texts: dict[int, str] = {}
        for number in numbers:
            source, row = self.corpus.locate(number)
            if isinstance(source, ShardSource):
                found[number] = source.tokens(row)
            elif (kept := self._encoded.get(number)) is not None:
                encoded[number] = kept
            else:
                try:
                    texts[number] = read_text(source, row, self.text)
                except UnusableRecordError:
                    if self.on_error == "raise":
                        raise
        if texts:
            made = _tokenizer(self.tokenizer).encode_batch(list(texts.values()))
            encoded |= {number: np.array(ids, np.int32) for number, ids in zip(texts, made, strict=True)}
        self._encoded.keep(encoded)
        return found | encoded


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    return load_tokenizer(path)


def document_groups(
    count: int,
    *,
    seed: int | None = None,
    epochs: int | None = 1,
    parts: Sequence[tuple[int, int]] = (),
    weights: Sequence[float] = (),
) -> grain.MapDataset:
    """Groups of document numbers in reading order: a random access dataset of lists of ints.

    Args:
      count: how many documents there are.
      seed: of the shuffle, which differs from epoch to epoch; None: in order.
      epochs: how often each document comes; None: endless.
      parts: with ``weights``: first document of each part, and the one after its last.
      weights: share of each part among the documents, in any stretch of them as nearly as can be; each part is
        repeated for ever. None: all documents are one.
    """
    if weights:
        mixed = [_shuffled(grain.MapDataset.range(*part), seed).repeat(None) for part in parts]
        return grain.MapDataset.mix(mixed, weights=list(weights)).batch(GROUP_DOCUMENTS, batch_fn=list)
    documents = _shuffled(grain.MapDataset.range(count), seed)
    # A group ends with its epoch, so that more epochs go on where fewer ended.
    return documents.batch(GROUP_DOCUMENTS, batch_fn=list).repeat(epochs)


def _shuffled(documents: grain.MapDataset, seed: int | None) -> grain.MapDataset:
    return documents if seed is None else documents.shuffle(seed=seed % 2**32)


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

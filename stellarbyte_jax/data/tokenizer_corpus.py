"""Corpora that a tokenizer is trained on, read as training reads its data, and samples drawn from them."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stellarbyte_jax.data.files import BadRecordError, DataError
from stellarbyte_jax.data.plain import PlainSource
from stellarbyte_jax.data.saved_dataset import data_files, is_saved_dataset
from stellarbyte_jax.data.sources import LineSource, cache_path, expand, open_lines, open_text, suffix_of, with_text
from stellarbyte_jax.data.text import TextFormat, UnusableRecordError, read_text, unusable
from stellarbyte_jax.tokenizer.training.stages import Sample

_SKIP = "--on-error skip"
HELD_OUT_SHARE = 50  # one document in so many is kept for the evaluation


@dataclass(frozen=True, kw_only=True)
class TokenizerCorpus:
    """Documents under one name: files of records as in ``data.train``; any other file is one document of UTF-8 text.

    Args:
      name: How stages and reports call it.
      paths: Files or globs, see ``sources.expand``. A file that several of them name is read once.
      text_field: Field of a record that holds the text.
      only: Field -> regular expression that must be found in it; other records are left out.
      on_error: "skip" leaves unusable records out and counts them.
      cache_dir: As ``data.cache_dir``.

    Raises:
      ValueError: An expression is malformed.
    """

    name: str
    paths: tuple[str, ...]
    text_field: str = "text"
    only: Mapping[str, str] = field(default_factory=dict)
    on_error: Literal["raise", "skip"] = "raise"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name, pattern in self.only.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"corpus {self.name!r}: {pattern!r}, for field {name!r}, is no regular expression: {error}"
                ) from None

    def sources(self) -> list[LineSource | PlainSource]:
        """The files, sorted; those without text among others of a pattern are left out.

        Raises:
          DataError: A pattern names none, or none with text.
        """
        columns, cache = self._columns, cache_path(self.cache_dir)
        found: dict[Path, LineSource | PlainSource] = {}
        for pattern in self.paths:
            setting = f"corpus {self.name!r}"
            named = expand(pattern, setting)
            files = [path for path in named if path.is_file()]
            files += [file for path in named if is_saved_dataset(path) for file in data_files(path, setting)]
            if not files:
                raise DataError(f"{setting}: {pattern} names only directories; name the files in them with a glob")
            opened = [open_lines(f, cache, columns) if suffix_of(f) else open_text(f, cache) for f in files]
            found |= {Path(source.name): source for source in with_text(opened, pattern, setting)}
        return [found[path] for path in sorted(found)]

    @property
    def _columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.text_field, *self.only)))

    def documents(self, on_skip: Callable[[], None] = lambda: None) -> Iterator[str]:
        """The texts in order of file and record; ``on_skip`` is called for each that is left out as unusable.

        Raises:
          DataError: A file is unusable, or a record is and ``on_error`` is "raise"; names the file, and the line or
            row.
        """
        for source in self.sources():
            for text in self._records(source) if isinstance(source, LineSource) else _plain(source):
                if not isinstance(text, UnusableRecordError):
                    yield text
                elif self.on_error == "raise":
                    raise text
                else:
                    on_skip()

    def _records(self, source: LineSource) -> Iterator[str | UnusableRecordError]:
        text, wanted = TextFormat((self.text_field,)), TextFormat(self._columns)
        for row in range(source.documents):
            try:
                values = wanted.values(source.record(row))
                if all(re.search(pattern, values[name]) for name, pattern in self.only.items()):
                    yield text.render(values)
            except BadRecordError as error:
                yield unusable(source, row, error, _SKIP)


def _plain(source: PlainSource) -> Iterator[str | UnusableRecordError]:
    try:
        yield read_text(source, 0, TextFormat(), _SKIP)
    except UnusableRecordError as error:
        yield error


def draw(
    corpus: TokenizerCorpus, cut: Callable[[str], Iterable[str]], sample_bytes: int, held_out_bytes: int
) -> Sample:
    """Counts the pieces of about ``sample_bytes`` of a corpus and keeps about ``held_out_bytes`` of other documents.

    A hash of each document's text decides, so equal documents fall on the same side and a rerun draws the same.

    Raises:
      DataError: The corpus holds no text, or a file of it is unusable.
    """
    sample = Sample(Counter(), 0, [])

    def count() -> None:
        sample.skipped += 1

    total = sum(len(text.encode()) for text in corpus.documents(count))
    if not total:
        skipped = f"{sample.skipped:,} lines were skipped; " if sample.skipped else ""
        raise DataError(f"corpus {corpus.name!r} holds no text: {skipped}check its paths and filters")
    keep = min(1.0, sample_bytes / total)
    keep_held_out = min(1.0, held_out_bytes / (total / HELD_OUT_SHARE))
    for text in corpus.documents():
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        rest, side = divmod(number, HELD_OUT_SHARE)
        fraction = rest / (2**64 // HELD_OUT_SHARE + 1)
        if side == 0:
            if fraction < keep_held_out:
                sample.held_out.append(text)
        elif fraction < keep:
            sample.pieces.update(cut(text))
            sample.training_bytes += len(text.encode())
    return sample

"""Data files as random access documents: JSONL (plain, gzip, zstd), Parquet, Arrow, text and prepared token shards.

Whatever cannot be read at random is converted once into the cache directory, so that a global shuffle and an
exact resume cost the same for every format.
"""

import bisect
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from stellarbyte_jax.config.foreign import clipped, digits, is_file_name, json_object, shown
from stellarbyte_jax.config.paths import expanded, home
from stellarbyte_jax.data.convert import CONVERTERS, write_atomically
from stellarbyte_jax.data.files import OPEN_FILES, ArrayFile, BadRecordError, ByteFile, DataError, write_array
from stellarbyte_jax.data.line_index import Lines, holds_text, index_lines, index_paragraphs
from stellarbyte_jax.data.line_index import open_index as _open_lines
from stellarbyte_jax.data.patterns import expand, given
from stellarbyte_jax.data.plain import PlainSource
from stellarbyte_jax.data.saved_dataset import data_files, is_saved_dataset

_log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")  # of files of records
TEXT_SUFFIX = ".txt"
_COLUMNAR = (".parquet", ".arrow")
SHARD_META = "meta.json"
SHARD_FORMAT = 1
_IDENTITY_BYTES = 1 << 16
_STEM_BYTES = 100  # with the key, within the 143 bytes that encrypted file systems leave of 255


def cache_path(cache_dir: str | Path | None) -> Path:
    """Where line indexes and converted files go; None: ``~/.cache/stellarbyte_jax``.

    Raises:
      DataError: there is no home directory.
    """
    if cache_dir is not None:
        return Path(expanded(cache_dir))
    place = home()
    if place is None:
        raise DataError("data.cache_dir: this user has no home directory to keep caches in: name a folder, or set HOME")
    return place / ".cache" / "stellarbyte_jax"


@functools.lru_cache(maxsize=OPEN_FILES)
def _open_shard(tokens: str, offsets: str) -> tuple[ArrayFile, ArrayFile]:
    return ArrayFile(tokens), ArrayFile(offsets)


@dataclass(frozen=True)
class LineSource:
    """JSON objects, one a line. ``name`` is the user's file, ``path`` the plain JSONL that holds its lines."""

    name: str
    path: str
    index: str
    documents: int

    @property
    def unit(self) -> str:
        """What a record is, for messages."""
        return "row" if self.name.endswith(_COLUMNAR) else "line"

    def record(self, row: int) -> dict[str, Any]:
        """The object in the given row.

        Raises:
          BadRecordError: the line is not UTF-8 or not one JSON object.
          DataError: the file became shorter.
        """
        value = self.value(row)
        if not isinstance(value, dict):
            raise BadRecordError(f"a line must hold a JSON object with the fields, not a {type(value).__name__}")
        return value

    def value(self, row: int) -> Any:
        """What the line of the given row says in JSON.

        Raises:
          BadRecordError: the line is not UTF-8 or no JSON.
          DataError: the file became shorter.
        """
        line = _open_lines(self.path, self.index).read(row).rstrip()  # blank lines may follow
        try:
            return json.loads(line.decode())
        except json.JSONDecodeError as error:
            raise BadRecordError(
                f"not valid JSON ({error.msg}); a line must hold one whole JSON object", error.colno
            ) from error
        except UnicodeDecodeError as error:
            raise BadRecordError("not valid UTF-8 (save the file as UTF-8)", error.start + 1) from error
        except RecursionError as error:
            raise BadRecordError("JSON nested too deeply") from error
        except ValueError as error:  # Python reads no integer of more than 4,300 digits
            raise BadRecordError("JSON with an integer of more than 4,300 digits") from error

    def location(self, row: int, column: int | None = None, line: int = 0) -> str:
        """``file:line`` or ``file:line:column`` of a row, for messages."""
        number = line + _open_lines(self.path, self.index).number(row)
        if self.name.endswith(_COLUMNAR):
            return f"{self.name} row {number}"
        return f"{self.name}:{number}" + (f":{column}" if column is not None else "")


@dataclass(frozen=True)
class ShardSource:
    """Documents that scripts/prepare_data.py tokenised, without BOS and EOS."""

    name: str
    shards: tuple[tuple[str, str], ...]  # (tokens.npy, offsets.npy)
    ends: tuple[int, ...]  # cumulative documents at the end of each shard

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.ends[-1]

    def tokens(self, row: int) -> np.ndarray:
        """The token ids of a document, [n] in the shard's integer type."""
        shard = bisect.bisect_right(self.ends, row)
        row -= self.ends[shard - 1] if shard else 0
        tokens, offsets = _open_shard(*self.shards[shard])
        begin, end = offsets.part(row, row + 2).tolist()
        return tokens.part(begin, end)


RecordSource = LineSource | PlainSource
_Source = TypeVar("_Source", bound=RecordSource | ShardSource)


class Corpus:
    """All documents of a list of sources under one index."""

    def __init__(self, sources: Sequence[RecordSource | ShardSource], entries: Sequence[int] = ()):
        """Joins the sources in their order.

        Args:
          sources: of documents.
          entries: how many of them each entry of a setting names, in their order; none: it is one entry.
        """
        self.sources = tuple(sources)
        self._entries = tuple(entries) or (len(self.sources),)
        self._ends = np.cumsum([s.documents for s in self.sources]).tolist()

    def __len__(self) -> int:
        """Documents in all sources."""
        return self._ends[-1]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Of each entry of the setting the number of its first document, and the one after its last."""
        ends = [0, *self._ends]
        after = list(itertools.accumulate(self._entries, initial=0))
        return [(ends[begin], ends[end]) for begin, end in itertools.pairwise(after)]

    @property
    def listing(self) -> list[tuple[str, int]]:
        """The name of each file, without its folder, and its documents: what a place in the data depends on."""
        return [(Path(s.name).name, s.documents) for s in self.sources]

    @property
    def contents(self) -> list[tuple[str, str]]:
        """Path of each file, and a hash of its size, beginning and end: whether it holds what it held."""
        paths = [
            path
            for source in self.sources
            for path in (itertools.chain(*source.shards) if isinstance(source, ShardSource) else [source.name])
        ]
        return [(path, _content(ByteFile(path))) for path in paths]

    @property
    def has_text(self) -> bool:
        """Whether any document is still to be tokenised."""
        return not all(isinstance(s, ShardSource) for s in self.sources)

    @property
    def has_plain(self) -> bool:
        """Whether any document is plain text."""
        return any(isinstance(s, PlainSource) for s in self.sources)

    def locate(self, document: int) -> tuple[RecordSource | ShardSource, int]:
        """The source of a document and its row there."""
        source = bisect.bisect_right(self._ends, document)
        return self.sources[source], document - (self._ends[source - 1] if source else 0)


def _content(file: ByteFile) -> str:
    found = hashlib.sha256(str(file.size).encode())
    found.update(file.read(0, min(file.size, _IDENTITY_BYTES)))
    found.update(file.read(max(0, file.size - _IDENTITY_BYTES), min(file.size, _IDENTITY_BYTES)))
    return found.hexdigest()[:16]


def open_corpus(
    patterns: Sequence[str],
    *,
    setting: str,
    columns: Sequence[str] | None,
    fingerprint: str,
    text_documents: Literal["file", "paragraph"] = "file",
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Opens every file that the paths or globs name; indexes and converts what is new.

    Args:
      patterns: paths or globs of files with one of ``SUFFIXES`` or ``TEXT_SUFFIX``, or of directories that
        scripts/prepare_data.py or ``save_to_disk`` of the datasets package made.
      setting: the name of the setting that they come from, for messages.
      columns: the fields that will be read, of texts; only these are taken from Parquet and Arrow files. None: all.
      fingerprint: of the tokenizer in use; prepared shards of another one are refused.
      text_documents: what a document of a text file is, the file or each paragraph.
      cache_dir: where indexes and converted files are kept, see :func:`cache_path`.

    Files without rows or lines among others of a pattern add nothing: writers of many parts leave such.

    Raises:
      DataError: nothing is named, a path is missing, corrupt or of an unknown kind, or no file of a pattern holds text.
    """
    _open_shard.cache_clear()  # files of the same names may have been made again
    cache = cache_path(cache_dir)
    sources: list[RecordSource | ShardSource] = []
    entries: list[int] = []
    for pattern in given(patterns, setting):
        opened: list[RecordSource | ShardSource] = []
        for path in expand(pattern, setting):
            if is_saved_dataset(path):
                opened += [open_lines(file, cache, columns) for file in data_files(path, setting)]
            elif path.is_dir():
                opened.append(_open_shards(path, fingerprint))
            elif path.suffix == TEXT_SUFFIX:
                opened.append(open_text(path, cache, text_documents))
            else:
                opened.append(open_lines(path, cache, columns))
        held = with_text(opened, pattern, setting)
        sources += held
        entries.append(len(held))
    return Corpus(sources, entries)


def with_text(opened: Sequence[_Source], pattern: str, setting: str) -> list[_Source]:
    """Those of a pattern's sources that hold documents.

    Raises:
      DataError: none does.
    """
    if not opened:  # saved data sets alone, which name no files where they have no rows
        raise DataError(f"{setting}: {pattern} has no rows: it was saved without any; name a data set with rows")
    held = [source for source in opened if source.documents]
    if not held:
        first = opened[0]
        rows = isinstance(first, LineSource) and first.unit == "row"
        why = "it has no rows" if rows else "it is empty, or its lines are blank"
        many = f"none of the {len(opened)} files that {pattern!r} names holds text, such as {first.name}"
        raise DataError(
            f"{setting}: {f'{first.name} holds no text' if len(opened) == 1 else many}: {why}; name files with text"
        )
    if len(held) < len(opened):
        _log.info("%s: %d of the %d files of %s hold no text", setting, len(opened) - len(held), len(opened), pattern)
    return held


def suffix_of(path: Path) -> str | None:
    """Which of ``SUFFIXES`` a file has; None: it holds no records."""
    return next((s for s in SUFFIXES if path.name.endswith(s)), None)


def open_text(path: Path, cache: Path, documents: Literal["file", "paragraph"] = "file") -> PlainSource:
    """Opens a file of plain text, as one document or as its paragraphs, which blank lines part.

    A file without text has no documents.

    Raises:
      DataError: the cache cannot be written.
    """
    size = path.stat().st_size
    if documents == "file":
        return PlainSource(str(path), size, documents=int(holds_text(path)))
    index = _cached(cache, path.stem, _key(path), ".lines.npy")
    if not index.exists():
        paragraphs = index_paragraphs(path)
        write_atomically(index, lambda out: write_array(out, paragraphs))
    _check_index(index)
    return PlainSource(str(path), size, str(index), Lines(str(path), str(index)).count)


def _key(path: Path, columns: Sequence[str] | None = ()) -> str:
    """What names a file, as it is now, in the cache, and the columns that are taken from it."""
    status = path.stat()
    taken = ["objects"] if columns is None else sorted(columns)
    identity = [str(path.resolve()), status.st_size, status.st_mtime_ns, *taken]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _cached(cache: Path, stem: str, key: str, suffix: str) -> Path:
    """A file of the cache; its name begins like that of the user's file, as far as there is room in a file's name."""
    begin = os.fsencode(stem)[:_STEM_BYTES].decode(errors="ignore")
    return cache / f"{begin}-{key}{suffix}"


def _check_index(index: Path) -> None:
    try:
        ArrayFile(str(index))
    except ValueError as error:
        raise DataError(f"{index} is damaged ({error}); delete it, it is made again") from error


def open_lines(path: Path, cache: Path, columns: Sequence[str] | None) -> LineSource:
    """Opens a file of records; converts it and indexes its lines where that is still to be done.

    A file without rows, or whose lines are blank, has no documents.

    Args:
      path: with one of ``SUFFIXES``.
      cache: directory of indexes and converted files.
      columns: the fields that will be read, of texts; only these are taken from Parquet files. None: all.

    Raises:
      DataError: the file is corrupt or of an unknown kind, or the cache cannot be written.
    """
    suffix = suffix_of(path)
    if suffix is None:
        kinds = ", ".join((*SUFFIXES, TEXT_SUFFIX))
        raise DataError(f"{path}: unknown kind of data file; use {kinds} or a directory of prepared data")
    if path.stat().st_size == 0 and suffix != ".jsonl":
        raise DataError(f"{path} has no bytes, as no file of this kind does; fetch or write it again")
    key = _key(path, columns if suffix in _COLUMNAR else ())
    stem = path.name.removesuffix(suffix)
    plain = path
    if suffix != ".jsonl":
        plain = _cached(cache, stem, key, ".jsonl")
        if not plain.exists():
            _log.info("converting %s to random access, once, into %s", path, plain)
            write_atomically(plain, lambda out: CONVERTERS[suffix](path, out, columns))
    index = _cached(cache, stem, key, ".lines.npy")
    if not index.exists():
        lines = index_lines(plain)
        write_atomically(index, lambda out: write_array(out, lines))
    _check_index(index)
    try:
        documents = Lines(str(plain), str(index)).count
    except DataError as error:
        if plain == path:
            raise
        raise DataError(f"{plain} is damaged ({error}); delete it, it is made again") from error
    return LineSource(str(path), str(plain), str(index), documents)


def _open_shards(path: Path, fingerprint: str) -> ShardSource:
    meta_path = path / SHARD_META
    if not meta_path.is_file():
        raise DataError(
            f"{path} has no {SHARD_META}: it holds no prepared data, or preparing it was interrupted; it has no "
            "state.json either, as data sets of save_to_disk have; to read files in it, name them with a glob"
        )
    try:
        meta = json_object(meta_path.read_bytes(), str(meta_path))
    except ValueError as error:
        raise DataError(f"{error}, or prepare the data again") from error
    try:
        version, made_with, shards = meta["format"], meta["tokenizer_fingerprint"], meta["shards"]
        sizes = [(s["documents"], s["tokens"]) for s in shards]
        named = [s[kind] for s in shards for kind in ("token_file", "offset_file")]
        if not all(map(is_file_name, named)):
            raise ValueError(f"shards must be files of this directory, got {shown(named)}")
        files = tuple((str(path / s["token_file"]), str(path / s["offset_file"])) for s in shards)
        if not sizes or not all(type(size) is int and 0 < size < 2**63 for pair in sizes for size in pair):
            raise ValueError(f"each shard must have documents and tokens, got {shown(sizes)}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{meta_path}: damaged ({clipped(repr(error))}); prepare the data again") from error
    if version != SHARD_FORMAT:
        raise DataError(
            f"{meta_path}: format {shown(version)}, this version reads {SHARD_FORMAT}; prepare the data again"
        )
    if made_with != fingerprint:
        raise DataError(
            f"{path} was prepared with another tokenizer (fingerprint {digits(made_with)}, data.tokenizer has "
            f"{digits(fingerprint)}); set data.tokenizer to that one or prepare the data again"
        )
    for (token_file, offset_file), (documents, count) in zip(files, sizes, strict=True):
        try:
            tokens, offsets = _open_shard(token_file, offset_file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: a shard is missing or damaged ({clipped(str(error))}); prepare the data again"
            ) from error
        if len(tokens) != count or len(offsets) != documents + 1:
            raise DataError(f"{clipped(token_file)}: not the size that {SHARD_META} gives; prepare the data again")
    return ShardSource(str(path), files, tuple(itertools.accumulate(documents for documents, _ in sizes)))

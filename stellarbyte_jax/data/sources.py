"""Data files as random access documents: JSONL (plain, gzip, zstd), Parquet and prepared token shards.

Whatever cannot be read at random is converted once into the cache directory, so that a global shuffle and an
exact resume cost the same for every format.
"""

import bisect
import functools
import glob
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SHARD_META = "meta.json"
SHARD_FORMAT = 1
_SCAN_BYTES = 1 << 26
_NEWLINE = 10
# Each open file holds a descriptor, and 1,024 is a common limit.
_OPEN_FILES = 128


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the rule and the likely fix."""


class BadRecordError(ValueError):
    """One unusable record. ``column`` is counted from 1 where a place inside the line is known."""

    def __init__(self, message: str, column: int | None = None):
        """Keeps the message and the place inside the line."""
        super().__init__(message)
        self.column = column


def cache_path(cache_dir: str | Path | None) -> Path:
    """Where line indexes and converted files go; None: ``~/.cache/stellarbyte_jax``."""
    return Path.home() / ".cache" / "stellarbyte_jax" if cache_dir is None else Path(cache_dir).expanduser()


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open_lines(path: str, index: str) -> tuple[mmap.mmap, np.ndarray]:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.load(index, allow_pickle=False)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open_shard(tokens: str, offsets: str) -> tuple[np.ndarray, np.ndarray]:
    # A plain ndarray over the map: slicing np.memmap itself costs several microseconds a document.
    return (
        np.asarray(np.load(tokens, mmap_mode="r", allow_pickle=False)),
        np.asarray(np.load(offsets, mmap_mode="r", allow_pickle=False)),
    )


@dataclass(frozen=True)
class LineSource:
    """JSON objects, one a line. ``name`` is the user's file, ``path`` the plain JSONL that holds its lines."""

    name: str
    path: str
    index: str
    documents: int

    def record(self, row: int) -> dict[str, Any]:
        """The object in the given row.

        Raises:
          BadRecordError: the line is not UTF-8 or not one JSON object.
        """
        lines, starts = _open_lines(self.path, self.index)
        start = int(starts[row])
        end = lines.find(b"\n", start)
        line = lines[start : end if end >= 0 else len(lines)]
        try:
            value = json.loads(line.decode("utf-8-sig" if start == 0 else "utf-8"))
        except json.JSONDecodeError as error:
            raise BadRecordError(
                f"not valid JSON ({error.msg}); a line must hold one whole JSON object", error.colno
            ) from error
        except UnicodeDecodeError as error:
            raise BadRecordError("not valid UTF-8; save the file as UTF-8", error.start + 1) from error
        except RecursionError as error:
            raise BadRecordError("JSON nested too deeply") from error
        if not isinstance(value, dict):
            raise BadRecordError(f"a line must hold a JSON object with the fields, not a {type(value).__name__}")
        return value

    def location(self, row: int, column: int | None = None) -> str:
        """``file:line`` or ``file:line:column`` of a row, for messages."""
        lines, starts = _open_lines(self.path, self.index)
        before, line = int(starts[row]), 1
        for begin in range(0, before, _SCAN_BYTES):
            line += lines[begin : min(begin + _SCAN_BYTES, before)].count(b"\n")
        if self.name.endswith(".parquet"):
            return f"{self.name} row {line}"
        return f"{self.name}:{line}" + (f":{column}" if column is not None else "")


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
        return tokens[offsets[row] : offsets[row + 1]]


class Corpus:
    """All documents of a list of sources under one index."""

    def __init__(self, sources: Sequence[LineSource | ShardSource]):
        """Joins the sources in their order."""
        self.sources = tuple(sources)
        self._ends = np.cumsum([s.documents for s in self.sources]).tolist()

    def __len__(self) -> int:
        """Documents in all sources."""
        return self._ends[-1]

    @property
    def listing(self) -> list[tuple[str, int]]:
        """The name of each file, without its folder, and its documents: what a place in the data depends on."""
        return [(Path(s.name).name, s.documents) for s in self.sources]

    @property
    def has_text(self) -> bool:
        """Whether any document is still to be tokenised."""
        return any(isinstance(s, LineSource) for s in self.sources)

    def locate(self, document: int) -> tuple[LineSource | ShardSource, int]:
        """The source of a document and its row there."""
        source = bisect.bisect_right(self._ends, document)
        return self.sources[source], document - (self._ends[source - 1] if source else 0)


def open_corpus(
    patterns: Sequence[str],
    *,
    setting: str,
    columns: Sequence[str],
    fingerprint: str,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Opens every file that the paths or globs name; indexes and converts what is new.

    Args:
      patterns: paths or globs of files with one of ``SUFFIXES``, or directories made by scripts/prepare_data.py.
      setting: the name of the setting that they come from, for messages.
      columns: the fields that will be read; only these are taken from Parquet files.
      fingerprint: of the tokenizer in use; prepared shards of another one are refused.
      cache_dir: where indexes and converted files are kept, see :func:`cache_path`.

    Raises:
      DataError: nothing is named, or a path is missing, empty, corrupt or of an unknown kind.
    """
    if not patterns:
        raise DataError(f"{setting} is empty: name at least one data file, such as {setting}=data/*.jsonl")
    cache = cache_path(cache_dir)
    sources: list[LineSource | ShardSource] = []
    for path in (p for pattern in patterns for p in expand(pattern, setting)):
        sources.append(_open_shards(path, fingerprint) if path.is_dir() else open_lines(path, cache, columns))
    return Corpus(sources)


def expand(pattern: str, setting: str) -> list[Path]:
    """The files and directories that a path or a glob names, sorted; ``**`` descends into folders.

    A path that exists is taken as it stands, so that brackets in a name need no escape.

    Args:
      pattern: path or glob; ``~`` is the home directory.
      setting: the name of the setting that it comes from, for messages.

    Raises:
      DataError: there is none.
    """
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"{setting}: {path} does not exist (looked from {Path.cwd()})")
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"{setting}: no file matches {pattern!r} (looked from {Path.cwd()})")
    return found


def suffix_of(path: Path) -> str | None:
    """Which of ``SUFFIXES`` a file has; None: it holds no records."""
    return next((s for s in SUFFIXES if path.name.endswith(s)), None)


def open_lines(path: Path, cache: Path, columns: Sequence[str]) -> LineSource:
    """Opens a file of records; converts it and indexes its lines where that is still to be done.

    Args:
      path: with one of ``SUFFIXES``.
      cache: directory of indexes and converted files.
      columns: the fields that will be read; only these are taken from Parquet files.

    Raises:
      DataError: the file is empty, corrupt or of an unknown kind, or the cache cannot be written.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(f"{path}: unknown kind of data file; use {', '.join(SUFFIXES)} or a directory of prepared data")
    status = path.stat()
    if status.st_size == 0:
        raise DataError(f"{path} is empty")
    identity = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    if suffix == ".parquet":
        identity += sorted(columns)
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    stem = path.name.removesuffix(suffix)
    plain = path
    if suffix != ".jsonl":
        plain = cache / f"{stem}-{key}.jsonl"
        if not plain.exists():
            _log.info("converting %s to random access, once, into %s", path, plain)
            convert = {".jsonl.gz": _from_gzip, ".jsonl.zst": _from_zstd, ".parquet": _from_parquet}[suffix]
            _write_atomically(plain, lambda out: convert(path, out, columns))
    index = cache / f"{stem}-{key}.lines.npy"
    if not index.exists():
        starts = line_starts(plain)
        _write_atomically(index, lambda out: np.save(out, starts, allow_pickle=False))
    documents = len(np.load(index, mmap_mode="r", allow_pickle=False))
    if documents == 0:
        raise DataError(f"{path} holds no documents, only blank lines")
    return LineSource(str(path), str(plain), str(index), documents)


def line_starts(path: Path) -> np.ndarray:
    """Byte offsets of the lines of a file that are not blank, int64 [lines]."""
    size = path.stat().st_size
    if size == 0:
        return np.zeros(0, np.int64)
    parts = [np.zeros(1, np.int64)]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
        for begin in range(0, size, _SCAN_BYTES):
            block = np.frombuffer(lines[begin : begin + _SCAN_BYTES], np.uint8)
            parts.append(np.flatnonzero(block == _NEWLINE) + (begin + 1))
        starts = np.concatenate(parts)
        starts = starts[starts < size]
        # Nearly every line begins with "{"; only the others can be blank and are looked at one by one.
        keep = np.ones(len(starts), bool)
        for i in np.flatnonzero(_bytes_at(lines, starts) != ord("{")):
            end = lines.find(b"\n", int(starts[i]))
            keep[i] = bool(lines[int(starts[i]) : end if end >= 0 else size].strip())
    return starts[keep]


def _bytes_at(lines: mmap.mmap, offsets: np.ndarray) -> np.ndarray:
    view = np.frombuffer(lines, np.uint8)
    values = view[offsets]
    del view  # the map cannot be closed while a view of it is alive
    return values


def _write_atomically(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-", suffix=target.suffix)
    except OSError as error:
        raise DataError(
            f"cannot write to the cache directory {target.parent}: {error.strerror}; choose another cache_dir"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(name, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error}; choose a cache_dir on a disk with room") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _from_gzip(path: Path, out: BinaryIO, columns: Sequence[str]) -> None:
    import gzip

    try:
        with gzip.open(path, "rb") as file:
            shutil.copyfileobj(file, out, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or not gzip ({error}); fetch the file again") from error


def _from_zstd(path: Path, out: BinaryIO, columns: Sequence[str]) -> None:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs zstandard; pip install zstandard") from error
    complete = zstandard.ZstdDecompressor().decompressobj()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                while block:
                    if complete.eof:
                        complete = zstandard.ZstdDecompressor().decompressobj()
                    out.write(complete.decompress(block))
                    block = complete.unused_data if complete.eof else b""
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged or not zstd ({error}); fetch the file again") from error
    if not complete.eof:
        raise DataError(f"{path}: the zstd stream is cut off; fetch the file again")


def _from_parquet(path: Path, out: BinaryIO, columns: Sequence[str]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            missing = [c for c in columns if c not in present]
            if missing:
                raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(present)}; name one of these")
            for column in columns:
                kind = file.schema_arrow.field(column).type
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                    raise DataError(f"{path}: column {column!r} must hold strings, it holds {kind}; name another one")
            for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                for record in batch.to_pylist():
                    out.write(json.dumps(record).encode() + b"\n")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


def _open_shards(path: Path, fingerprint: str) -> ShardSource:
    meta_path = path / SHARD_META
    if not meta_path.is_file():
        raise DataError(
            f"{path} has no {SHARD_META}: it holds no prepared data, or preparing it was interrupted; "
            "to read files in it, name them with a glob"
        )
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        version, made_with, shards = meta["format"], meta["tokenizer_fingerprint"], meta["shards"]
        ends = np.cumsum([s["documents"] for s in shards]).tolist()
        files = tuple((str(path / s["token_file"]), str(path / s["offset_file"])) for s in shards)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{meta_path}: damaged ({error!r}); prepare the data again") from error
    if version != SHARD_FORMAT:
        raise DataError(f"{meta_path}: format {version}, this version reads {SHARD_FORMAT}; prepare the data again")
    if made_with != fingerprint:
        raise DataError(
            f"{path} was prepared with another tokenizer (fingerprint {made_with}, data.tokenizer has {fingerprint}); "
            "set data.tokenizer to that one or prepare the data again"
        )
    for (token_file, offset_file), shard in zip(files, shards, strict=True):
        try:
            tokens, offsets = _open_shard(token_file, offset_file)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: a shard is missing or damaged ({error}); prepare the data again") from error
        if len(tokens) != shard["tokens"] or len(offsets) != shard["documents"] + 1:
            raise DataError(f"{token_file}: not the size that {SHARD_META} gives; prepare the data again")
    return ShardSource(str(path), files, tuple(ends))

"""Compressed and columnar files as plain JSONL, which can be read at random."""

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from stellarbyte_jax.command import directory_for, remedy
from stellarbyte_jax.config.foreign import clipped, listed
from stellarbyte_jax.data.files import DataError

_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_NOT_UTF8 = b"\xff\n"  # stands for a record that is not


def write_atomically(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Makes a file of the cache; it appears whole or not at all.

    Raises:
      DataError: the directory cannot be written, or is full.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(directory_for(target.parent))
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-", suffix=target.suffix)
        except OSError as error:
            raise DataError(
                f"cannot write to the cache directory {target.parent}: {error.strerror}; "
                f"{remedy(error, 'cache_dir') or 'choose another cache_dir'}"
            ) from error
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            os.replace(name, target)
        except OSError as error:
            advice = remedy(error, "cache_dir") or "choose a cache_dir on a disk with room"
            raise DataError(f"cannot write {target}: {error.strerror or error}; {advice}") from error
        finally:
            Path(name).unlink(missing_ok=True)


def _from_gzip(path: Path, out: BinaryIO, columns: Sequence[str] | None) -> None:
    import gzip

    try:
        with gzip.open(path, "rb") as file:
            shutil.copyfileobj(file, out, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or not gzip ({clipped(str(error))}); fetch the file again") from error


def _from_zstd(path: Path, out: BinaryIO, columns: Sequence[str] | None) -> None:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs zstandard; pip install zstandard") from error
    # The largest window that the format allows: large dumps are often written with long ones.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << zstandard.WINDOWLOG_MAX)
    complete = decompressor.decompressobj()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                while block:
                    if complete.eof:
                        complete = decompressor.decompressobj()
                    out.write(complete.decompress(block))
                    block = complete.unused_data if complete.eof else b""
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged or not zstd ({clipped(str(error))}); fetch the file again") from error
    if not complete.eof:
        raise DataError(f"{path}: the zstd stream is cut off; fetch the file again")


def _from_parquet(path: Path, out: BinaryIO, columns: Sequence[str] | None) -> None:
    _write_records(_parquet_batches(path, columns), out)


def _from_arrow(path: Path, out: BinaryIO, columns: Sequence[str] | None) -> None:
    _write_records(_arrow_batches(path, columns), out)


def _write_records(batches: Iterator[Any], out: BinaryIO) -> None:
    for batch in batches:
        for record in _records(batch):
            out.write(_NOT_UTF8 if record is None else json.dumps(record, default=str).encode() + b"\n")


def _parquet_batches(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    """The rows of a Parquet file. What fails in writing them is not caught here: it is no fault of the file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:  # its columns may be of any type, or missing
                return
            _check_columns(path, file.schema_arrow, columns)
            yield from file.iter_batches(batch_size=1024, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({clipped(str(error))})") from error


def _arrow_batches(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    """The rows of a stream of Arrow record batches, of which ``columns`` alone are read."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(f"{path}: reading Arrow needs pyarrow; pip install pyarrow") from error
    try:
        with pa.OSFile(str(path)) as file:
            file.seek(max(0, file.size() - len(_ARROW_END)))
            complete = file.read() == _ARROW_END
            file.seek(0)
            with pa.ipc.open_stream(file) as stream:
                schema = stream.schema
            if complete and not _has_rows(file, schema):  # its columns may be of any type, or missing
                return
            _check_columns(path, schema, columns)
            if not complete:
                raise DataError(f"{path}: the Arrow stream is cut off; copy the file again")
            file.seek(0)
            read = range(len(schema.names)) if columns is None else [schema.names.index(name) for name in columns]
            options = pa.ipc.IpcReadOptions(included_fields=list(read))
            with pa.ipc.open_stream(file, options=options) as stream:
                for batch in stream:
                    for begin in range(0, batch.num_rows, 1024):
                        yield batch.slice(begin, 1024)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as a stream of Arrow batches, as save_to_disk of the datasets package writes them "
            f"({clipped(str(error))})"
        ) from error


def _has_rows(file: Any, schema: Any) -> bool:
    """Whether any batch of a stream holds rows; of each, one column is read at most."""
    import pyarrow as pa

    file.seek(0)
    options = pa.ipc.IpcReadOptions(included_fields=[0] if schema.names else [])
    with pa.ipc.open_stream(file, options=options) as stream:
        return any(batch.num_rows for batch in stream)


def _check_columns(path: Path, schema: Any, columns: Sequence[str] | None) -> None:
    """Raises DataError where a column is missing, is there twice or holds no strings; None asks for none."""
    import pyarrow as pa

    present = schema.names
    if columns is None:
        return
    missing = [c for c in columns if c not in present]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; it has {listed(present)}; name one of these")
    for column in columns:
        if present.count(column) > 1:
            raise DataError(
                f"{path}: {present.count(column)} columns are called {column!r}; rename them or name another"
            )
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(
                f"{path}: column {column!r} must hold strings, it holds {clipped(str(kind))}; name another one"
            )


def _records(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one whose text is not UTF-8, which other writers do not check."""
    try:
        yield from _rows(batch)
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                (record,) = _rows(batch.slice(row, 1))
            except UnicodeDecodeError:
                record = None
            yield record


def _rows(batch: Any) -> list[dict[str, Any]]:
    kinds = {field.name: field.type for field in batch.schema}
    return [{name: _as_given(value, kinds[name]) for name, value in row.items()} for row in batch.to_pylist()]


def _as_given(value: Any, kind: Any) -> Any:
    """What was put into a column: an object without the fields that only other rows have, JSON as what it says.

    All objects of a column have the fields of all of them, so that one without a field cannot be told from one whose
    field is null: what tools are called with would hold the arguments of every other tool.
    """
    import pyarrow as pa

    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        return _said(value) if kind.extension_name == "arrow.json" else value
    if pa.types.is_struct(kind):
        return {each.name: _as_given(value[each.name], each.type) for each in kind if value[each.name] is not None}
    if pa.types.is_map(kind):
        return {name: _as_given(each, kind.item_type) for name, each in value}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_as_given(each, kind.value_type) for each in value]
    return value


def _said(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


CONVERTERS: dict[str, Callable[[Path, BinaryIO, Sequence[str] | None], None]] = {
    ".jsonl.gz": _from_gzip,
    ".jsonl.zst": _from_zstd,
    ".parquet": _from_parquet,
    ".arrow": _from_arrow,
}

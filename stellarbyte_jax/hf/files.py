"""Sharded safetensors files, read and written one tensor at a time.

Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import errno
import glob
import json
import math
import os
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from ml_dtypes import bfloat16

from stellarbyte_jax.command import make_directory
from stellarbyte_jax.config.foreign import clipped, is_file_name, json_object, listed, shown
from stellarbyte_jax.config.paths import real
from stellarbyte_jax.hf.checksums import check, checksum, metadata_of, stored_checksums, unknown_checksums

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(bfloat16): "BF16"}
_READABLE = ("F64", "F32", "F16", "BF16")
# What was read of a mapped file counts as memory of the process until it is mapped anew, after so many bytes.
_MAPPED = 2**27
# Into the same directory, whose tokenizer then stays with the weights.
_PICKLED = (
    "import sys, transformers as t; d = sys.argv[1]; t.AutoModelForCausalLM.from_pretrained(d).save_pretrained(d)"
)


def float_dtype(name: str) -> np.dtype:
    """The numpy dtype called ``float32``, ``bfloat16`` or ``float16``.

    Raises:
      ValueError: it has another name.
    """
    dtypes = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16), "float16": np.dtype(np.float16)}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file is missing or is not one.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {path.parent} is not a complete Hugging Face directory")
    return json_object(path.read_bytes(), str(path))


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: its file, its name there, and its checksum where the file has them."""

    path: Path
    name: str
    checksum: str | None


class WeightFiles:
    """The tensors of a checkpoint directory by name; a context manager that maps the files and keeps no copy."""

    def __init__(self, directory: Path, *, verify: bool = True, single: str = SINGLE) -> None:
        """Opens the directory's safetensors files; ``verify`` says whether tensors are compared with their checksums.

        ``single`` is the file where there is one; one of another name has no index.

        Raises:
          ValueError: they are missing, unreadable, or differ from their index or from their list of checksums.
        """
        self.directory = directory
        self._verify = verify
        self._single = single
        self._handles: dict[Path, Any] = {}
        self._touched: dict[Path, int] = {}  # bytes that were read of a file since it was mapped
        self._stored: dict[str, _Stored] = {}
        self._metadata: list[Mapping[str, str]] = []
        try:
            self._open()
        except BaseException:
            self._close()
            raise

    def _open(self) -> None:
        index = self.directory / INDEX
        named = None
        # Beside one file an index is an older model's.
        if index.is_file() and self._single == SINGLE and not (self.directory / SINGLE).is_file():
            named = read_json(index).get("weight_map")
            if not (isinstance(named, dict) and named):
                raise ValueError(f"{index} has no weight_map from tensor to file: copy the file again")
            wrong = [name for name, file in named.items() if not is_file_name(file)]
            if wrong:
                raise ValueError(
                    f"{index}: {shown(wrong[0])} must be in a file of this directory, not in "
                    f"{shown(named[wrong[0]])}: copy the file again"
                )
        for file in sorted(set(named.values())) if named else [self._single]:
            path = self.directory / file
            if not path.is_file():
                raise ValueError(_missing(self.directory, path, named_by=index if named else None))
            handle = self._map(path)
            names = handle.keys()
            self._metadata.append(handle.metadata() or {})
            checksums = stored_checksums(self._metadata[-1], names, path) if self._verify else {}
            for name in names:
                if name in self._stored:
                    raise ValueError(f"{path}: tensor {clipped(name)} also lies in another file of {self.directory}")
                self._stored[name] = _Stored(path, name, checksums.get(name))
        absent = [name for name in named or () if name not in self._stored]
        if absent:
            raise ValueError(f"{index} lists {listed(absent)}, which its files do not hold: copy the files again")

    def _map(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self._handles[path] = safe_open(path, framework="np").__enter__()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({clipped(str(error))}): copy the file again"
            ) from error
        return self._handles[path]

    def _map_anew(self) -> None:
        for path in self._touched:
            self._handles.pop(path).__exit__(None, None, None)
            self._map(path)
        self._touched = {}

    def _close(self) -> None:
        for handle in self._handles.values():
            handle.__exit__(None, None, None)

    def _slice(self, name: str) -> Any:
        stored = self._stored[name]
        return self._handles[stored.path].get_slice(stored.name)

    def names(self) -> list[str]:
        """Every tensor."""
        return list(self._stored)

    def metadata(self, entry: str) -> str | None:
        """The value of an entry in the metadata of every file; None where one lacks it or they differ."""
        values = {held.get(entry) for held in self._metadata}
        return values.pop() if len(values) == 1 else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor's numbers as the format calls it, such as ``BF16``, from the header alone."""
        return self._slice(name).get_dtype()

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name, if there is such a tensor."""
        if old in self._stored:
            self._stored[new] = self._stored.pop(old)

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, whole.

        Raises:
          ValueError: its numbers are no plain floats, or differ from their checksum.
        """
        stored, dtype = self._stored[name], self.dtype(name)
        if dtype not in _READABLE:
            raise ValueError(
                f"{self.directory}: tensor {clipped(name)} is stored as {dtype}, readable are {', '.join(_READABLE)}. "
                "Load the model with transformers, dequantize it and save it as float32 or bfloat16"
            )
        if sum(self._touched.values()) > _MAPPED:
            self._map_anew()
        array = self._handles[stored.path].get_tensor(stored.name)
        self._touched[stored.path] = self._touched.get(stored.path, 0) + array.nbytes
        if stored.checksum is not None:
            check(array, stored.checksum, stored.name, stored.path)
        return array

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _missing(directory: Path, path: Path, named_by: Path | None) -> str:
    if named_by is not None:
        return f"{path} does not exist, but {named_by.name} names it: copy the missing file"
    pickled = sorted(p.name for p in directory.glob("*.bin"))
    if pickled:
        names = listed(pickled)
        return (
            f"{directory} holds weights only as {names}, a pickle, which is not read because it can run code. "
            f"Write safetensors beside it once: python -c {shlex.quote(_PICKLED)} {shlex.quote(str(directory))}"
        )
    return f"{directory} holds neither {SINGLE} nor {INDEX}: it is not a complete Hugging Face directory"


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: what the header says, and how to get the numbers when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.size * self.dtype.itemsize


def write_tensors(
    directory: Path,
    tensors: Sequence[Tensor],
    max_shard_bytes: int,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes one file, or numbered files of at most ``max_shard_bytes`` with an index; a larger tensor gets its own.

    Each has the ``metadata`` beside the checksums of its tensors.

    Raises:
      ValueError: ``max_shard_bytes`` is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0], metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard, metadata)
        weight_map |= {tensor.name: file for tensor in shard}
    total = {"total_parameters": sum(t.size for t in tensors), "total_size": sum(t.nbytes for t in tensors)}
    write_json(directory / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def write_file(path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one file, with the ``metadata`` beside the checksums of its tensors."""
    checksums = unknown_checksums(tensor.name for tensor in tensors)
    with path.open("wb") as file:
        file.write(_header(tensors, {**metadata, **metadata_of(checksums)}))
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read())
            assert array.shape == tensor.shape and array.dtype == tensor.dtype, tensor.name
            file.write(array.reshape(-1).view(np.uint8).data)
            checksums[tensor.name] = checksum(array)
            del array  # it may be all that keeps the leaf that it is a part of, while the next one is read
        file.seek(0)
        file.write(_header(tensors, {**metadata, **metadata_of(checksums)}))  # as long as before
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(target: Path, overwrite: bool, marker: str = "config.json") -> Iterator[Path]:
    """Gives an empty directory beside ``target`` that takes its place in one rename when the block succeeds.

    A link is followed: it leads to what was written.

    Raises:
      ValueError: ``target`` is a file, or holds something and ``overwrite`` is false, or lacks the file ``marker`` that
        directories of its kind have.
    """
    target = real(target)
    clear_abandoned(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: give a directory")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{target} is not empty: give another directory, or ask to overwrite it")
        if not (target / marker).is_file():
            raise ValueError(f"{target} holds something that is no model (no {marker}), so it is not overwritten")
    make_directory(target.parent, "directory")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        partial.mkdir()
    except OSError as error:
        raise OSError(f"{target} cannot be made: {error.strerror or error}; choose another directory") from error
    made = partial.stat()
    try:
        yield partial
        if not (partial.is_dir() and os.path.samestat(made, partial.stat())):  # moved away, and made anew by a writer
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(partial))
        if target.is_dir():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.is_dir():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear_abandoned(target: Path, *, alone: bool = False) -> None:
    """Removes what writers of ``target`` left behind that were killed.

    What one had moved out of the way comes back where nothing had taken its place.

    Args:
      target: the directory.
      alone: whether it is known that nobody writes it now, whatever process has the number of one that did.
    """
    target = real(target)
    for what in ("old", "partial"):
        for left in [*target.parent.glob(f".{glob.escape(target.name)}.{what}-*")]:
            process = left.name.rpartition("-")[2]
            if not process.isdigit() or not (alone or not _is_other_process(int(process))):
                continue
            if what == "old" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_other_process(number: int) -> bool:
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

"""Checksums of tensors in the metadata of a safetensors file, so that a damaged export is found when it is read.

One entry maps every tensor of its file to the CRC-32 of its bytes, in eight hexadecimal digits. Other programs ignore
the entry, and leave it out of what they write.
"""

import json
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from stellarbyte_jax.config.foreign import clipped, json_object, listed, shown

ENTRY = "checksums_crc32"  # the algorithm is part of the name: another one is another entry
_DIGITS = 8


def checksum(array: np.ndarray) -> str:
    """Of the numbers of a tensor as they lie in the file; as long for any of them."""
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):0{_DIGITS}x}"


def unknown_checksums(names: Iterable[str]) -> dict[str, str]:
    """What takes as much room as checksums that are not known yet."""
    return dict.fromkeys(names, "0" * _DIGITS)


def metadata_of(checksums: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file whose tensors have these checksums."""
    entry = json.dumps(checksums, separators=(",", ":"))
    return {"format": "pt", ENTRY: entry}  # transformers refuses a file without the format


def stored_checksums(metadata: Mapping[str, str] | None, tensors: Collection[str], path: Path) -> dict[str, str]:
    """The checksums of a file's tensors; none where it was written without the entry.

    Raises:
      ValueError: the entry is no map from each of the tensors to a checksum.
    """
    if metadata is None or ENTRY not in metadata:
        return {}
    where = f"{path}: {ENTRY} in its metadata"
    found = json_object(metadata[ENTRY].encode(), where)
    for name, value in found.items():
        if not (isinstance(value, str) and len(value) == _DIGITS and set(value) <= set("0123456789abcdef")):
            raise ValueError(
                f"{where} must give {_DIGITS} hexadecimal digits for each tensor, got {shown(value)} for "
                f"{clipped(name)}. Copy the file again, or save it without the entry"
            )
    apart = sorted(found.keys() ^ set(tensors))
    if apart:
        raise ValueError(
            f"{where} and the file's tensors differ in {listed(apart)}. Copy the file again; a program that renames, "
            "adds or removes tensors must leave the entry out"
        )
    return found


def check(array: np.ndarray, expected: str, tensor: str, path: Path) -> None:
    """Compares a whole tensor with its checksum; a part of one cannot be compared.

    Raises:
      ValueError: they differ.
    """
    if checksum(array) != expected:
        raise ValueError(
            f"{path}: tensor {clipped(tensor)} differs from its checksum: the file is damaged. Copy it or export the "
            f"model again; a program that changes numbers must leave {ENTRY} out of the metadata"
        )

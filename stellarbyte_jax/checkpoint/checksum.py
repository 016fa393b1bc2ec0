"""Checksums of JSON values, and arrays that differ from theirs."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.ops.checksum import array_checksums


def json_checksum(value: Any) -> str:
    """A hash of a JSON value, whatever the order of its names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differing(tree: Any, expected: Mapping[str, int]) -> list[str]:
    """Paths of the arrays whose checksum is another one, or that have none."""
    return [path for path, value in array_checksums(tree).items() if expected.get(path) != value]

"""Hostile values and files, and what is asked of whoever reads them."""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.data.files import DataError

DEEP = 20_000  # brackets in brackets, more than Python's parser follows


def is_one_line(error: ValueError) -> bool:
    """Whether a message is short and cannot take over a terminal or a log."""
    text = str(error)
    return 0 < len(text) < 2000 and not set(text) & set(map(chr, [*range(32), *range(127, 160), 0x2028, 0x2029]))


def accepts(function: Callable[[], Any]) -> bool:
    """Whether it returns; a refusal must be a ValueError of one line, and nothing else may be raised."""
    try:
        function()
    except ValueError as error:
        assert type(error) in (ValueError, ConfigError, DataError), repr(error)[:300]
        assert is_one_line(error), f"{len(str(error))} characters: {str(error)[:300]!r}"
        return False
    return True


NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf")]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "\n", "\x1b[2J", "a\nb\r\u2028c", "\ud800", "x" * 200_000, "../x", "/etc/passwd", "\0", "词" * 99]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _paths(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, valid: Any, names: tuple[str, ...] = ()) -> Any:
    """A valid JSON object with up to three values replaced, removed, added under ``names`` or any name, or swapped."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        paths = _paths(value)
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "swap"]))
        if kind == "add" or not paths:
            value[draw(st.sampled_from(names) | TEXTS if names else TEXTS)] = draw(JSON_VALUES)
            continue
        *parents, last = draw(st.sampled_from(paths))
        target = value
        for key in parents:
            target = target[key]
        if kind == "remove":
            del target[last]
        elif kind == "swap":
            *others, key = draw(st.sampled_from(paths))
            source = value
            try:
                for other in others:
                    source = source[other]
                target[last] = copy.deepcopy(source[key])
            except (KeyError, IndexError, TypeError):
                continue
        else:
            target[last] = draw(JSON_VALUES)
    return value


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes, cut, with some of them replaced, or with others put in."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["cut", "put", "replace"]))
        if kind == "cut":
            del content[at:]
        else:
            new = draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"[", b"{", b'"', b"\\u0000", b"9" * 5000]))
            content[at : at + len(new) * (kind == "replace")] = new
    return bytes(content)


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


RAW = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"",
            b"[" * DEEP,
            b'{"a":' * DEEP,
            b"[" * DEEP + b"]" * DEEP,
            b'{"a": ' + b"9" * 5000 + b"}",
            b"\xff{}",
            b"{}{}",
            b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}",
            b"\xef\xbb\xbf{}",
            b"null",
            b'{"a": 1e999}',
            b'{"a": NaN}',
        ]
    ),
)


def files_like(valid: Any, names: tuple[str, ...] = ()) -> st.SearchStrategy[bytes]:
    """Contents of a JSON file: a valid object mutated, its bytes damaged, any JSON, or no JSON at all."""
    return st.one_of(
        mutated(valid, names).map(json_bytes), damaged(json_bytes(valid)), JSON_VALUES.map(json_bytes), RAW
    )

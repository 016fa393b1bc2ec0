"""Files of a model's directory: safetensors, their index, tokenizer files, templates and records."""

import functools
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from helpers.hostile import JSON_VALUES, RAW, TEXTS, accepts, damaged, files_like, is_one_line, json_bytes, mutated
from helpers.tiny_documents import save_byte_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from stellarbyte_jax.data.encode import EncodeDocuments
from stellarbyte_jax.data.files import DataError
from stellarbyte_jax.data.sources import Corpus, _open_lines, open_lines
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.hf.checksums import ENTRY
from stellarbyte_jax.hf.files import INDEX, SINGLE, WeightFiles
from stellarbyte_jax.tokenizer.byte_lengths import token_byte_lengths
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.directory import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    LIBRARY,
    MODEL_CONFIG,
    SPECIAL_TOKENS_MAP,
)
from stellarbyte_jax.tokenizer.special import adds_bos, special_ids, stop_ids

HELD = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.float16([1.5])}
STORED = save(HELD)
LENGTH = struct.unpack("<Q", STORED[:8])[0]
HEADER = json.loads(STORED[8 : 8 + LENGTH])
DATA = STORED[8 + LENGTH :]
SUMS = {name: f"{zlib.crc32(x.tobytes()):08x}" for name, x in HELD.items()}


def with_sums(entry: bytes) -> dict[str, Any]:
    return HEADER | {"__metadata__": {"format": "pt", ENTRY: entry.decode(errors="replace")}}


def with_header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + DATA


TENSORS = st.one_of(
    mutated(HEADER).map(lambda header: with_header(json_bytes(header))),
    files_like(SUMS).map(lambda entry: with_header(json_bytes(with_sums(entry)))),
    st.integers(0, 2**64 - 1).map(lambda length: with_header(json_bytes(HEADER), length)),
    damaged(STORED),
    RAW.map(with_header),
    RAW,
)


def changed(name: str, **fields: Any) -> bytes:
    return with_header(json_bytes(HEADER | {name: HEADER["a"] | fields}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(tmp_path_factory.mktemp)


def read_all(directory: Path) -> None:
    with WeightFiles(directory) as files:
        for name in files.names():
            files.shape(name)
            files.read(name)


@given(TENSORS)
@example(changed("a", dtype="Q99"))
@example(changed("a", dtype="x" * 200_000 + "\n"))
@example(with_header(json_bytes({"x\n" * 100_000: HEADER["a"] | {"dtype": "I32"}, "b": HEADER["b"]})))
@example(changed("a", shape=[2**63, 2**63]))
@example(changed("a", data_offsets=[0, 2**63]))
@example(changed("x" * 200_000 + "\n\x1b[2J", data_offsets=[0, 24]))
@example(with_header(b'{"a":1,"a":2}'))
@example(with_header(json_bytes(with_sums(json_bytes({"x\n" * 100_000: "00000000"})))))
@example(with_header(json_bytes(with_sums(json_bytes({"a": "\n" * 100_000})))))
@example(with_header(json_bytes(with_sums(json_bytes(SUMS | {"b": "1" * 8})))))
@example(with_header(json_bytes(with_sums(b"[" * 100_000))))
def test_safetensors(folder: Callable[[str], Path], content: bytes) -> None:
    directory = folder("tensors")
    (directory / SINGLE).write_bytes(content)
    accepts(lambda: read_all(directory))


def test_the_checksums_that_are_bent_are_the_right_ones(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(with_header(json_bytes(with_sums(json_bytes(SUMS)))))
    assert accepts(lambda: read_all(tmp_path))


MAP = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


@given(files_like(MAP) | st.dictionaries(TEXTS, JSON_VALUES).map(lambda found: json_bytes({"weight_map": found})))
@example(json_bytes({"weight_map": {"a": "x" * 256}}))
@example(json_bytes({"weight_map": {"a": "one.safetensors\n"}}))
@example(json_bytes({"weight_map": {"\n" * 200_000: "one.safetensors"}}))
def test_indexes(folder: Callable[[str], Path], content: bytes) -> None:
    directory = folder("index")
    if not (directory / "two.safetensors").exists():
        save_file({"a": np.zeros(3, "f4")}, directory / "one.safetensors")
        save_file({"b": np.zeros(3, "f4")}, directory / "two.safetensors")
    (directory / INDEX).write_bytes(content)
    accepts(lambda: read_all(directory))


def test_a_hostile_name_in_two_files(tmp_path: Path) -> None:
    for file in ("one.safetensors", "two.safetensors"):
        save_file({"x\n" * 100_000: np.zeros(3, "f4")}, tmp_path / file)
    (tmp_path / INDEX).write_bytes(json_bytes(MAP))
    assert not accepts(lambda: read_all(tmp_path))


LIBRARY_FILE: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "<s>"},
}
for flag in ("single_word", "lstrip", "rstrip", "normalized"):
    LIBRARY_FILE["added_tokens"][0][flag] = False
FILES: dict[str, Any] = {
    LIBRARY: LIBRARY_FILE,
    CONFIG: {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "added_tokens_decoder": {"3": {"content": "<x>", "special": True}},
    },
    SPECIAL_TOKENS_MAP: {"pad_token": "a", "unk_token": "<s>"},
    ADDED_TOKENS: {"<y>": 4},
    GENERATION_CONFIG: {"eos_token_id": [1, 2], "bos_token_id": 0},
    MODEL_CONFIG: {"eos_token_id": 1},
}


def load_all(directory: Path) -> None:
    """Each reader by itself: one that refuses must not hide the others."""
    readers = [
        lambda: load_tokenizer(directory),
        lambda: special_ids(directory, 100),
        lambda: stop_ids(directory, 1),
        lambda: adds_bos(directory, 0, 1),
        lambda: token_byte_lengths(directory),
    ]
    for reader in readers:
        accepts(reader)


@given(st.sampled_from(sorted(FILES)).flatmap(lambda name: st.tuples(st.just(name), files_like(FILES[name]))))
@example((CONFIG, json_bytes(FILES[CONFIG] | {"chat_template": 3})))
@example((CONFIG, json_bytes(FILES[CONFIG] | {"chat_template": [{"template": "a"}]})))
@example((CONFIG, json_bytes(FILES[CONFIG] | {"chat_template": [3]})))
@example((CONFIG, json_bytes(FILES[CONFIG] | {"added_tokens_decoder": {"3": {"content": "\ud800", "special": 1}}})))
@example((CONFIG, json_bytes(FILES[CONFIG] | {"bos_token": "x" * 200_000})))
@example((CONFIG, json_bytes(FILES[CONFIG] | {"bos_token": ["x" * 200_000]})))
@example((GENERATION_CONFIG, json_bytes({"eos_token_id": [2**70]})))
@example((GENERATION_CONFIG, json_bytes({"eos_token_id": ["\n" * 200_000]})))
@example((CHAT_TEMPLATE, b"\xff"))
@example((ADDED_TOKENS, b'{"a": 1e999}'))
@example((LIBRARY, json_bytes(LIBRARY_FILE | {"model": "x"})))
@example((LIBRARY, json_bytes(LIBRARY_FILE | {"model": LIBRARY_FILE["model"] | {"vocab": {"<s>": 2**32 - 1}}})))
@example((LIBRARY, json_bytes(LIBRARY_FILE | {"decoder": "x"})))
def test_tokenizer_directories(folder: Callable[[str], Path], changed: tuple[str, bytes]) -> None:
    directory = folder("tokenizer")
    shutil.rmtree(directory)
    directory.mkdir()
    for name, values in FILES.items():
        (directory / name).write_bytes(json_bytes(values))
    (directory / changed[0]).write_bytes(changed[1])
    load_all(directory)


RECORD = {"text": "学而时习之 <s>\r\n", "title": "t", "number": 1}
BLANKS = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\n \t\r\n\x0b\n"])
RECORD_FILES = st.builds(
    lambda mark, lines: mark + b"".join(line + end for line, end in lines) + json_bytes(RECORD),
    st.sampled_from([b"", b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"]),
    st.lists(st.tuples(st.just(json_bytes(RECORD)) | files_like(RECORD, ("text",)), BLANKS), min_size=1, max_size=4),
)


def texts_of(content: bytes, fields: tuple[str, ...]) -> list[tuple[int, str | None]]:
    """Number and text of each line that is not blank; None where the json module, strings or UTF-8 refuse it."""
    found: list[tuple[int, str | None]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip().decode())
            text = "\n".join(record[name] for name in fields)
            text.encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        found.append((number, text))
    return found


@given(RECORD_FILES, st.sampled_from([("text",), ("title", "text"), ("none",)]))
@example(b'{"text": "a"}\n{"text": "b"}\r\n{"text": "c"', ("text",))
@example(b'{"text": "a\\ud800"}\n["text"]\n"text"\n\n{"text": ""}\n{"text": "b", "text": "c"}', ("text",))
@example(json_bytes({"x\n\x1b[2J" * 10**5: 1, "text": 1}), ("none",))
def test_records(folder: Callable[[str], Path], content: bytes, fields: tuple[str, ...]) -> None:
    """Training reads the texts that are good, and leaves the others out or names the first of them."""
    path = folder("records") / "a.jsonl"
    tokenizer = folder("bytes")
    if not (tokenizer / LIBRARY).exists():
        save_byte_tokenizer(tokenizer)
    vocabulary = load_tokenizer(tokenizer)
    path.write_bytes(content)
    shutil.rmtree(path.parent / "cache", ignore_errors=True)
    _open_lines.cache_clear()  # the file is another one under the same name
    corpus = Corpus([open_lines(path, path.parent / "cache", fields)])
    expected = texts_of(content, fields)
    bad = [number for number, text in expected if text is None]

    def read(on_error: Literal["raise", "skip"]) -> list[str]:
        encode = EncodeDocuments(corpus, TextFormat(fields), str(tokenizer), bos=None, eos=None, on_error=on_error)
        group = encode(range(len(corpus)))
        assert group["skipped"] == len(bad)
        documents = np.split(group["tokens"], np.cumsum(group["lengths"])[:-1]) if len(group["lengths"]) else []
        return [vocabulary.decode(ids, skip_special_tokens=False) for ids in documents]

    assert len(corpus) == len(expected)
    good = [text for _, text in expected if text]  # an empty one has no tokens
    assert read("skip") == good
    if bad:
        with pytest.raises(DataError) as caught:
            read("raise")
        assert re.match(rf"{re.escape(str(path))}:{bad[0]}\b", str(caught.value)), str(caught.value)[:300]
        assert is_one_line(caught.value), str(caught.value)[:300]
    else:
        assert read("raise") == good

"""Checksums that travel with exports: what a flipped bit does, and that other programs read and write such files."""

import itertools
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, assert_same_tree, random_model, tensors
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stellarbyte_jax.hf.checksums import ENTRY
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.files import INDEX, SINGLE, Tensor, WeightFiles, write_tensors

HELD = {
    "a": np.arange(6, dtype="f4").reshape(2, 3),
    "b": np.asarray([1.5, -2.0, 3.0], bfloat16),
    "c": np.float16([[0.5]]),
    "one": np.float32([2.0]),
    "none": np.zeros((0, 3), "f4"),
    'ein "名"\n\\': np.ones((2, 2), "f4"),  # a name that JSON escapes, twice in the entry
}
DAMAGED = (
    r"tensor {} differs from its checksum: the file is damaged\. Copy it or export the model again; a program that"
)


def write(directory: Path, held: dict[str, np.ndarray], limit: int = 10**9) -> Path:
    directory.mkdir(exist_ok=True)
    made = [Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in held.items()]
    write_tensors(directory, made, limit)
    return directory


def read(directory: Path, **options: bool) -> dict[str, np.ndarray]:
    with WeightFiles(directory, **options) as files:
        return {name: files.read(name) for name in files.names()}


def assert_equal(found: dict[str, np.ndarray], held: dict[str, np.ndarray]) -> None:
    assert found.keys() == held.keys()
    for name, array in held.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as handle:
        return handle.metadata()


def flip(path: Path, original: bytes, byte: int, bit: int) -> None:
    content = bytearray(original)
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def read_after_each_flip(path: Path, places: range) -> Iterator[dict[str, np.ndarray] | str]:
    """What is read after each flipped bit, or the error, which is one line."""
    original = path.read_bytes()
    for place, bit in itertools.product(places, range(8)):
        flip(path, original, place, bit)
        try:
            yield read(path.parent)
        except ValueError as error:
            assert "\n" not in str(error)
            yield str(error)


def data_start(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def with_entry(directory: Path, held: dict[str, np.ndarray], entry: str) -> Path:
    save_file(held, directory / SINGLE, metadata={"format": "pt", ENTRY: entry})
    return directory


def test_the_entry_gives_the_checksum_of_every_tensor(tmp_path: Path) -> None:
    found = metadata(write(tmp_path, HELD) / SINGLE)
    assert found.keys() == {"format", ENTRY} and found["format"] == "pt"
    assert json.loads(found[ENTRY]) == {name: f"{zlib.crc32(x.tobytes()):08x}" for name, x in HELD.items()}
    assert_equal(load_file(tmp_path / SINGLE), HELD)
    assert_equal(read(tmp_path), HELD)


def test_a_flip_of_any_bit_of_the_numbers_names_file_and_tensor(tmp_path: Path) -> None:
    path = write(tmp_path, HELD) / SINGLE
    original = path.read_bytes()
    begin = data_start(original)
    owners = [name for name, x in HELD.items() for _ in range(x.nbytes)]
    assert len(owners) == len(original) - begin
    for place, owner in enumerate(owners):
        for bit in range(8):
            flip(path, original, begin + place, bit)
            with WeightFiles(tmp_path) as files:
                for name in HELD:
                    if name != owner:
                        files.read(name)
                with pytest.raises(ValueError) as caught:
                    files.read(owner)
            shown = repr(owner)[1:-1].replace('"', r"\"") if owner.startswith("ein") else owner
            said = str(caught.value)
            assert said.startswith(f"{path}: tensor ") and " differs from its checksum" in said and "\n" not in said
            assert owner.startswith("ein") or f"tensor {shown} differs" in said
    assert read(tmp_path, verify=False).keys() == HELD.keys()


def test_a_flip_anywhere_in_the_header_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    held = {name: HELD[name] for name in ("a", "b", "c")} | {"a2": HELD["a"] + 1}
    path = write(tmp_path, held) / SINGLE
    refused = {"entry": 0, "else": 0}
    for found in read_after_each_flip(path, range(data_start(path.read_bytes()))):
        if isinstance(found, str):
            refused["entry" if "checksum" in found else "else"] += 1
        else:
            assert_equal(found, held)
    assert min(refused.values()) > 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_with_a_flipped_bit_is_not_read(tmp_path: Path, dtype: str) -> None:
    model, params = random_model(tie_word_embeddings=True, num_hidden_layers=1)
    save_pretrained(tmp_path, model, params, dtype=dtype)
    path = tmp_path / SINGLE
    original = path.read_bytes()
    header = json.loads(original[8 : data_start(original)])
    assert "lm_head.weight" not in header
    numbers = np.random.default_rng(0)
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = about["data_offsets"]
        for place in (int(numbers.integers(begin, end)), end - 1):
            flip(path, original, data_start(original) + place, int(numbers.integers(8)))
            with pytest.raises(ValueError, match=rf"^{path}: {DAMAGED.format(name)}"):
                from_pretrained(tmp_path)
    from_pretrained(tmp_path, verify=False)
    path.write_bytes(original)
    back = from_pretrained(tmp_path, dtype=dtype)[1]
    assert_same_tree(back, {k: _as(v, dtype) for k, v in params.items()})


def _as(tree: Any, dtype: str) -> Any:
    return {k: _as(v, dtype) for k, v in tree.items()} if isinstance(tree, dict) else tree.astype(dtype)


def test_shards_have_the_checksums_of_their_own_tensors(tmp_path: Path) -> None:
    write(tmp_path, HELD, 24)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        assert json.loads(metadata(path)[ENTRY]).keys() == load_file(path).keys()
    assert_equal(read(tmp_path), HELD)
    for path in files:
        original = path.read_bytes()
        flip(path, original, len(original) - 1, 7)
        with pytest.raises(ValueError, match=rf"^{path}: tensor .* differs from its checksum"):
            read(tmp_path)
        path.write_bytes(original)


def test_a_shard_of_another_export_of_the_same_names_is_read(tmp_path: Path) -> None:
    """Each file is whole by itself: what a directory of two exports means is not for checksums of damage to say."""
    write(tmp_path, HELD, 24)
    other = write(tmp_path / "other", HELD | {"b": HELD["b"] * 2}, 24)
    shutil.copy(other / "model-00002-of-00003.safetensors", tmp_path)
    assert_equal(read(tmp_path), HELD | {"b": HELD["b"] * 2})


def test_a_flip_anywhere_in_the_index_is_an_error_or_changes_no_number(tmp_path: Path) -> None:
    """At most it gives two tensors one name, and the file of the other is not opened: from_pretrained misses those."""
    write(tmp_path, {name: HELD[name] for name in "abc"}, 8)
    path = tmp_path / INDEX
    refused = lost = 0
    for found in read_after_each_flip(path, range(path.stat().st_size)):
        if isinstance(found, str):
            refused += 1
        else:
            assert_equal(found, {name: HELD[name] for name in found})
            lost += len(found) < 3
    assert refused > 100 and lost < 5


@pytest.mark.parametrize("stored_as", ["head", "table"])
def test_a_tied_table_is_compared_under_either_name(tmp_path: Path, stored_as: str) -> None:
    model, params = random_model(tie_word_embeddings=True)
    save_pretrained(tmp_path, model, params)
    held = tensors(tmp_path)
    name = "model.embed_tokens.weight"
    if stored_as == "head":
        held["lm_head.weight"], name = held.pop(name), "lm_head.weight"
    path = write(tmp_path, held) / SINGLE
    assert_same_tree(from_pretrained(tmp_path)[1], params)
    original = path.read_bytes()
    header = json.loads(original[8 : data_start(original)])
    flip(path, original, data_start(original) + header[name]["data_offsets"][1] - 1, 0)
    with pytest.raises(ValueError, match=rf"^{path}: {DAMAGED.format(name)}"):
        from_pretrained(tmp_path)


def test_files_of_other_programs_have_no_entry_and_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, HELD) / SINGLE
    save_file({name: x * 2 for name, x in load_file(path).items()}, path)
    assert_equal(read(tmp_path), {name: x * x.dtype.type(2) for name, x in HELD.items()})
    save_file(HELD, path, metadata={"format": "pt"})
    assert_equal(read(tmp_path), HELD)


@pytest.mark.parametrize("change", ["renamed", "added", "removed"])
def test_a_program_that_keeps_the_entry_for_other_tensors_is_told(tmp_path: Path, change: str) -> None:
    entry = metadata(write(tmp_path, HELD) / SINGLE)[ENTRY]
    held = dict(HELD)
    if change != "added":
        held.pop("a")
    if change != "removed":
        held["z"] = HELD["a"]
    with_entry(tmp_path, held, entry)
    apart = {"renamed": "a, z", "added": "z", "removed": "a"}[change]
    message = (
        rf"{SINGLE}: {ENTRY} in its metadata and the file's tensors differ in {apart}\. Copy .* leave the entry out$"
    )
    with pytest.raises(ValueError, match=message):
        WeightFiles(tmp_path)
    assert_equal(read(tmp_path, verify=False), held)


@pytest.mark.parametrize(
    "array", [np.float64([0.5]), np.float32([0.5, 1.5]), np.float16([0.5])], ids=["f8", "f4", "f2"]
)
def test_a_program_that_keeps_the_entry_for_other_numbers_is_told(tmp_path: Path, array: np.ndarray) -> None:
    entry = metadata(write(tmp_path, {"a": np.float32([0.5])}) / SINGLE)[ENTRY]
    with_entry(tmp_path, {"a": array}, entry)
    with pytest.raises(ValueError, match=DAMAGED.format("a")):
        read(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", r"is not valid JSON: .*\. Copy the file again$"),
        ("sha256", r"is not valid JSON: .*\. Copy the file again$"),
        ('["a"]', "must hold a JSON object, got list$"),
        ('{"a": 3}', r"must give 8 hexadecimal digits for each tensor, got 3 for a\. Copy the file again, or save it"),
        ('{"a": "123"}', r"must give 8 hexadecimal digits for each tensor, got '123' for a\."),
        ('{"a": "0000000G"}', r"must give 8 hexadecimal digits for each tensor, got '0000000G' for a\."),
        ('{"x\\ny": null}', r"must give 8 hexadecimal digits for each tensor, got None for x\\ny\."),
        ("{}", r"and the file's tensors differ in a\."),
    ],
)
def test_an_entry_that_is_no_map_of_checksums_is_named(tmp_path: Path, entry: str, message: str) -> None:
    with_entry(tmp_path, {"a": HELD["a"]}, entry)
    with pytest.raises(ValueError, match=f"{SINGLE}: {ENTRY} in its metadata {message}"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one file", "shards"])
def test_transformers_reads_and_writes_such_a_directory(tmp_path: Path, dtype: str, limit: int) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoModelForCausalLM

    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params, dtype=dtype, max_shard_bytes=limit)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=getattr(torch, dtype))
    weights = peer.state_dict()
    held = tensors(tmp_path / "hf")
    assert weights.keys() == held.keys()
    for name, array in held.items():
        np.testing.assert_array_equal(weights[name].float().numpy(), array.astype("f4"), err_msg=name)
    with torch.no_grad():
        peer.model.norm.weight.add_(1)
    peer.save_pretrained(tmp_path / "back")
    for path in (tmp_path / "back").glob("*.safetensors"):
        assert ENTRY not in metadata(path)
    changed = from_pretrained(tmp_path / "back")[1]
    expected = from_pretrained(tmp_path / "hf")[1]
    np.testing.assert_allclose(changed["final_norm"]["scale"], expected["final_norm"]["scale"] + 1, atol=1e-2)
    assert_same_tree(changed | {"final_norm": None}, expected | {"final_norm": None})

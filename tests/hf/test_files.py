"""Safetensors files against the library's own reader and writer, broken ones, and directories that appear at once."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stellarbyte_jax.hf import files
from stellarbyte_jax.hf.files import (
    INDEX,
    SINGLE,
    Tensor,
    WeightFiles,
    clear_abandoned,
    float_dtype,
    read_json,
    replacing,
    write_json,
    write_tensors,
)

HELD = {
    "a": np.arange(6, dtype="f4").reshape(2, 3),
    "b": np.asarray([1.5, -2.0], bfloat16),
    "c": np.float16([[0.5]]),
    "d": np.float64([1e300]),
}
SHARDS = {"one.safetensors": ("a", "c"), "two.safetensors": ("b", "d")}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(HELD, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for file, names in SHARDS.items():
        save_file({name: HELD[name] for name in names}, tmp_path / file)
    write_index(tmp_path)
    return tmp_path


def write_index(directory: Path, **more: str) -> None:
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | more}))


def test_an_index_that_names_two_files_for_a_tensor_is_refused(sharded: Path) -> None:
    index = sharded / INDEX
    index.write_text(index.read_text().replace('"a": "one', '"a": "two.safetensors", "a": "one'))
    with pytest.raises(ValueError, match=f"{INDEX} gives two values for the key 'a', 'two.safetensors' and 'one."):
        WeightFiles(sharded)


def test_dtypes_by_name() -> None:
    dtypes = [np.dtype(np.float32), np.dtype(bfloat16), np.dtype(np.float16)]
    assert [float_dtype(name) for name in ("float32", "bfloat16", "float16")] == dtypes
    with pytest.raises(ValueError, match=r"^dtype must be one of float32, bfloat16, float16, got 'int8'$"):
        float_dtype("int8")


def test_json_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, None], "词": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    null\n  ],\n  "词": "é"\n}\n'
    assert read_json(path) == {"a": [1, None], "词": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.json does not exist: .* is not a complete Hugging Face directory$"),
        (b"{", r"x\.json is not valid JSON: .*\. Copy the file again$"),
        (b'{"a": "\xff"}', r"x\.json is not valid JSON: .*\. Copy the file again$"),
        (b"[1]", r"x\.json must hold a JSON object, got list$"),
    ],
    ids=["missing", "broken", "not UTF-8", "no object"],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_are_read_as_they_are_stored(kind: str, request: pytest.FixtureRequest) -> None:
    with WeightFiles(request.getfixturevalue(kind)) as files:
        assert sorted(files.names()) == sorted(HELD)
        for name, array in HELD.items():
            assert files.shape(name) == array.shape
            found = files.read(name)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)


def test_what_was_read_does_not_stay_in_memory(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that much was read of is mapped anew, and no other one."""
    opened: list[str] = []

    def noted(path: Path, **options: Any) -> Any:
        opened.append(path.name)
        return safe_open(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", noted)
    monkeypatch.setattr(files, "_MAPPED", 0)
    with WeightFiles(sharded) as weights:
        for name in ("a", "c", "b", "d", "a", "c"):
            np.testing.assert_array_equal(weights.read(name), HELD[name])
            assert weights.shape(name) == HELD[name].shape
    one, two = SHARDS
    assert opened == [one, two, one, one, two, two, one]  # each the file of the read before


def test_files_that_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    save_file({"a": np.zeros(9, "f4")}, sharded / "three.safetensors")
    with WeightFiles(sharded) as files:
        np.testing.assert_array_equal(files.read("a"), HELD["a"])


@pytest.mark.parametrize("shards", ["there", "gone"])
def test_one_file_goes_before_the_index_of_an_older_model(sharded: Path, shards: str) -> None:
    """As in transformers, which leaves the index behind when it saves a model again in one file."""
    save_file({"a": np.full(3, 7, "f4")}, sharded / SINGLE)
    if shards == "gone":
        for name in SHARDS:
            (sharded / name).unlink()
    with WeightFiles(sharded) as files:
        assert files.names() == ["a"]
        np.testing.assert_array_equal(files.read("a"), np.full(3, 7, "f4"))


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", "", 3, None, ["x"]]
)
def test_an_index_names_files_of_its_own_directory(tmp_path: Path, file: Any) -> None:
    save_file({"a": HELD["a"]}, tmp_path / "secret.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(
        ValueError, match=r"index\.json: 'a' must be in a file of this directory, not in .*copy the file"
    ):
        WeightFiles(directory)


def test_a_tensor_may_get_another_name(single: Path) -> None:
    with WeightFiles(single) as files:
        files.rename("a", "z")
        files.rename("missing", "y")
        assert sorted(files.names()) == ["b", "c", "d", "z"]
        assert files.shape("z") == (2, 3)
        np.testing.assert_array_equal(files.read("z"), HELD["a"])


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    for left in (".x.partial-99999999", ".x.partial-1", ".y.partial-99999999", ".x.partial-abc", ".x.old-1"):
        (tmp_path / left).mkdir()
    with replacing(tmp_path / "x", overwrite=False) as partial:
        (partial / "config.json").write_text("{}")
    others = [".x.old-1", ".x.partial-1", ".x.partial-abc", ".y.partial-99999999", "x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == others
    clear_abandoned(tmp_path / "x", alone=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.partial-abc", ".y.partial-99999999", "x"]


@pytest.mark.parametrize("killed_before", ["second rename", "removal"])
def test_what_a_killed_writer_moved_out_of_the_way_comes_back_or_goes(tmp_path: Path, killed_before: str) -> None:
    target = tmp_path / "model"
    fill(target, "old")
    target.rename(tmp_path / ".model.old-99999999")
    if killed_before == "removal":
        fill(tmp_path / "new", "new")
        (tmp_path / "new").rename(target)
    (tmp_path / ".model.partial-99999999").mkdir()
    with pytest.raises(ValueError, match="model is not empty"):  # as if it had never been away
        fill(target, "newer")
    assert os.listdir(tmp_path) == ["model"]
    assert (target / "config.json").read_text() == ("new" if killed_before == "removal" else "old")


def test_a_folder_that_is_exchanged_while_a_model_is_written_gets_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(FileNotFoundError, match="partial-"), replacing(run / "hf", False) as partial:
        run.rename(tmp_path / "moved")
        partial.mkdir(parents=True)  # by another program that begins there anew
        (partial / "config.json").write_text("{}")
    assert os.listdir(run) == []


@pytest.mark.parametrize("dtype", ["i4", "u1", "?"])
def test_a_tensor_of_no_plain_floats_is_named(tmp_path: Path, dtype: str) -> None:
    save_file({"packed": np.zeros((2, 2), dtype)}, tmp_path / SINGLE)
    stored = {"i4": "I32", "u1": "U8", "?": "BOOL"}[dtype]
    message = rf"tensor packed is stored as {stored}, readable are F64, F32, F16, BF16\. Load .* dequantize it and save"
    with WeightFiles(tmp_path) as files:
        assert files.shape("packed") == (2, 2)
        with pytest.raises(ValueError, match=message):
            files.read("packed")


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} holds neither {SINGLE} nor {INDEX}: it is not a complete"):
        WeightFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin, a pickle.* can run code\..*save_pretrained"):
        WeightFiles(tmp_path)
    for i in range(6):
        (tmp_path / f"part-{i}.bin").touch()
    with pytest.raises(ValueError, match=r"only as part-0\.bin, .*, part-4\.bin and 2 more, a pickle"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<Q", 10**9) + b"{}"])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{SINGLE} is not a readable safetensors file \(.+\): copy the file again$"):
        WeightFiles(tmp_path)


def test_a_truncated_file_is_named(single: Path) -> None:
    (single / SINGLE).write_bytes((single / SINGLE).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{SINGLE} is not a readable safetensors file"):
        WeightFiles(single)


@pytest.mark.parametrize("content", [{"metadata": {}}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_named(sharded: Path, content: dict[str, Any]) -> None:
    (sharded / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{INDEX} has no weight_map from tensor to file: copy the file again$"):
        WeightFiles(sharded)


def test_a_tensor_that_the_files_do_not_hold_is_named(sharded: Path) -> None:
    write_index(sharded, ghost="one.safetensors")
    with pytest.raises(ValueError, match=rf"{INDEX} lists ghost, which its files do not hold: copy the files again$"):
        WeightFiles(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    message = rf"two\.safetensors does not exist, but {INDEX} names it: copy the missing file$"
    with pytest.raises(ValueError, match=message):
        WeightFiles(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    save_file(HELD, sharded / "two.safetensors")
    with pytest.raises(ValueError, match=rf"two\.safetensors: tensor [ac] also lies in another file of {sharded}$"):
        WeightFiles(sharded)


def tensor(name: str, array: np.ndarray, order: list[str] | None = None) -> Tensor:
    def read() -> np.ndarray:
        if order is not None:
            order.append(name)
        return array

    return Tensor(name, array.shape, array.dtype, read)


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    held = {name: HELD[name] for name in "abc"} | {"e": HELD["a"].T, "none": np.zeros((0, 3), "f4")}
    order: list[str] = []
    write_tensors(tmp_path, [tensor(name, array, order) for name, array in held.items()], 10**6)
    assert os.listdir(tmp_path) == [SINGLE] and order == list(held)
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == held.keys()
    for name, array in held.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / SINGLE, framework="np") as handle:
        assert handle.metadata()["format"] == "pt"  # transformers refuses a file without it
    assert struct.unpack("<Q", (tmp_path / SINGLE).read_bytes()[:8])[0] % 8 == 0  # the numbers begin aligned


@pytest.mark.parametrize(
    ("limit", "shards"),
    [
        (60, ["abcd"]),
        (59, ["abc", "d"]),
        (36, ["ab", "cd"]),
        (24, ["ab", "c", "d"]),
        (23, ["a", "b", "c", "d"]),  # c is larger than that, and has a file of its own
    ],
)
def test_a_shard_is_as_full_as_it_may_be(tmp_path: Path, limit: int, shards: list[str]) -> None:
    sizes = {"a": 4, "b": 2, "c": 6, "d": 3}
    held = {name: np.full(size, ord(name), "f4") for name, size in sizes.items()}
    write_tensors(tmp_path, [tensor(name, array) for name, array in held.items()], limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert ["".join(sorted(load_file(file))) for file in files] == shards
    if len(shards) == 1:
        assert os.listdir(tmp_path) == [SINGLE]
        return
    assert [f.name for f in files] == [f"model-0000{i + 1}-of-0000{len(shards)}.safetensors" for i in range(len(files))]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 15, "total_size": 60}
    assert index["weight_map"] == {name: f.name for f, names in zip(files, shards, strict=True) for name in names}


@pytest.mark.parametrize("limit", [0, -1])
def test_a_shard_holds_something(tmp_path: Path, limit: int) -> None:
    with pytest.raises(ValueError, match=rf"^max_shard_bytes must be positive, got {limit}$"):
        write_tensors(tmp_path, [tensor("a", HELD["a"])], limit)


def fill(target: Path, text: str, overwrite: bool = False) -> None:
    with replacing(target, overwrite) as partial:
        assert partial.parent == target.absolute().parent and not any(partial.iterdir())
        (partial / "config.json").write_text(text)


def test_a_directory_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing(Path("new/model"), False) as partial:
        (partial / "config.json").write_text("{}")
        assert not (tmp_path / "new" / "model").exists()
    assert os.listdir("new") == ["model"] and os.listdir("new/model") == ["config.json"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    fill(tmp_path / "model", "{}")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["config.json"]


def test_an_earlier_model_is_replaced_whole(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    (tmp_path / "model" / "more").touch()
    with pytest.raises(ValueError, match=r"model is not empty: give another directory, or ask to overwrite it$"):
        fill(tmp_path / "model", "new")
    fill(tmp_path / "model", "new", overwrite=True)
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["config.json"]
    assert (tmp_path / "model" / "config.json").read_text() == "new"


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_another_disk_stays_one(tmp_path: Path, there: bool) -> None:
    place, link = tmp_path / "disk" / "model", tmp_path / "run" / "hf"
    link.parent.mkdir()
    link.symlink_to(place)
    if there:
        place.mkdir(parents=True)
        (place / "config.json").write_text("old")
    with replacing(link, True) as partial:
        assert partial.parent == place.parent
        (partial / "config.json").write_text("new")
    assert link.is_symlink() and (place / "config.json").read_text() == "new"
    assert os.listdir(link.parent) == ["hf"] and os.listdir(place.parent) == ["model"]


def test_what_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    letter = tmp_path / "home" / "letter.txt"
    letter.write_text("dear")
    with pytest.raises(ValueError, match=r"home holds something that is no model \(no config\.json\), so it is not"):
        fill(tmp_path / "home", "{}", overwrite=True)
    with pytest.raises(ValueError, match=r"letter\.txt is a file: give a directory$"):
        fill(letter, "{}", overwrite=True)
    assert letter.read_text() == "dear" and os.listdir(tmp_path) == ["home"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "model", True) as partial:
        (partial / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_a_failed_rename_puts_the_earlier_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no more renames")
        return rename(self, target)

    fill(tmp_path / "model", "old")
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no more renames"):
        fill(tmp_path / "model", "new", overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("")
    with pytest.raises(OSError, match=r"letter cannot be made: .*; .*choose another directory$"):
        fill(tmp_path / "letter" / "model", "{}")
    with pytest.raises(OSError, match=r"^/proc/model cannot be made: .*; choose another directory$"):
        fill(Path("/proc/model"), "{}")

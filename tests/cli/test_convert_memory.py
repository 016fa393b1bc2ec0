"""``convert`` holds one array of a model at a time, and what it cannot read changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.hf_models import assert_same_tree, random_model
from helpers.live_arrays import LiveArrays

from stellarbyte_jax.checkpoint import store
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.cli.convert import main
from stellarbyte_jax.hf import tensors
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained


def counted(memory: LiveArrays, read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *what: memory.copy(read(*what))


def test_one_array_at_a_time_whatever_the_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = random_model(num_hidden_layers=8, vocab_size=256)
    leaves = jax.tree.leaves(params)
    largest = max(leaf.nbytes for leaf in leaves)
    assert 2 * largest < sum(leaf.nbytes for leaf in leaves)
    save_initial(tmp_path / "run", model.config, params, str(tmp_path / "no-tokenizer"))
    out, back = LiveArrays(), LiveArrays()
    monkeypatch.setattr(store, "read_leaf", counted(out, store.read_leaf))
    monkeypatch.setattr(tensors, "_read_leaf", counted(back, tensors._read_leaf))
    assert main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--max-shard-size", "40KB"]) == 0
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) > 4
    assert (out.made, out.peak) == (len(leaves), largest)
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert (back.made, back.peak) == (2 * len(leaves), largest)  # for the checksums, and for the files
    assert_same_tree(load_weights(tmp_path / "back")[1], params)


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_directory_leaves_the_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, params = random_model()
    save_initial(tmp_path / "run", model.config, params, str(tmp_path / "no-tokenizer"))
    save_pretrained(tmp_path / "hf", model, params)
    flip_last_bit(tmp_path / "hf" / "model.safetensors")
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run"), "--overwrite"]) == 1
    error = capsys.readouterr().err.strip()
    assert "differs from its checksum: the file is damaged" in error and "\n" not in error
    assert_same_tree(load_weights(tmp_path / "run")[1], params)


def test_a_damaged_run_leaves_the_earlier_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, params = random_model()
    save_initial(tmp_path / "run", model.config, params, str(tmp_path / "no-tokenizer"))
    save_pretrained(tmp_path / "hf", model, params)
    read = store.read_leaf

    def damaged(item: Path, path: tuple[str, ...], dtype: Any) -> np.ndarray:
        return read(item, path, dtype) + np.float32(path[-1] == "gate_up")

    monkeypatch.setattr(store, "read_leaf", damaged)
    assert main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--overwrite"]) == 1
    error = capsys.readouterr().err.strip()
    where = f"checkpoint {tmp_path / 'run' / 'checkpoints' / '0'} is unreadable"
    assert f"{where}: OSError: params/layers/0/mlp/gate_up differs from its checksum" in error and "\n" not in error
    assert_same_tree(from_pretrained(tmp_path / "hf")[1], params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]

"""``convert`` holds one array of a model at a time, and what it cannot read changes nothing."""

import subprocess
import sys
import time
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


def peak_of(*arguments: Any) -> int:
    """The most bytes of its own that a command had in memory, those of mapped files left out."""
    command = [sys.executable, "-m", "stellarbyte_jax", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))])
        time.sleep(0.01)
    assert process.wait() == 0
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells the memory of a process there")
def test_a_command_needs_less_memory_than_the_model_has(tmp_path: Path) -> None:
    """Its largest array has 0.5 GB of 1.4 GB, and what else is needed does not grow with the model."""
    model, params = random_model(
        hidden_size=1024, intermediate_size=2560, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=32000,
    )  # fmt: skip
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 1.2e9 < size < 1.5e9
    save_initial(tmp_path / "run", model.config, params, str(tmp_path / "no-tokenizer"))
    del params
    assert peak_of("convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--max-shard-size", "250MB") < 0.9 * size
    assert peak_of("convert", "from-hf", tmp_path / "hf", tmp_path / "back") < 0.9 * size

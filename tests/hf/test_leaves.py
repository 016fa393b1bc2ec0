"""Lazy weights while a directory is written or read: each is read once, and no longer in memory than it is needed."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.hf_models import assert_same_tree, random_model, tensors
from helpers.live_arrays import LiveArrays

from stellarbyte_jax.hf import directory
from stellarbyte_jax.hf.directory import from_pretrained, open_pretrained, save_pretrained
from stellarbyte_jax.hf.layout import SAME
from stellarbyte_jax.hf.leaves import leaf_after_leaf
from stellarbyte_jax.hf.table import Entry, Piece, Row
from stellarbyte_jax.model.lazy import as_numpy, lazy


def entry(name: str, *paths: str) -> Entry:
    return Entry(name, tuple(Piece(path, (), (1,), Row("", "", SAME)) for path in paths))


def test_tensors_of_a_leaf_follow_each_other() -> None:
    layers = [entry(f"{name}.{i}", *paths) for i in range(2) for name, *paths in ("ua", "qbcd", "ve", "we", "zd")]
    ordered = [one.theirs for one in leaf_after_leaf([entry("first", "f"), *layers])]
    assert ordered == ["first", "u.0", "u.1", "q.0", "q.1", "z.0", "z.1", "v.0", "w.0", "v.1", "w.1"]


@pytest.mark.parametrize(
    ("family", "vocab_size", "together"),
    [("llama", 32, "gate_up"), ("llama", 1024, "embedding"), ("phi3", 32, "qkv")],
)
def test_a_leaf_is_read_once_and_dropped_after_its_last_tensor(
    family: str, vocab_size: int, together: str, tmp_path: Path
) -> None:
    """Those of one tensor are in memory together; nothing else is, whichever leaf is the largest."""
    key_heads = 4 if together == "qkv" else 2
    model, params = random_model(
        num_hidden_layers=6, intermediate_size=40, num_key_value_heads=key_heads, vocab_size=vocab_size
    )
    memory = LiveArrays()
    leaves, layers = jax.tree.leaves(params), params["layers"]["0"]
    save_pretrained(tmp_path / "lazy", model, jax.tree.map(memory.lazy, params), family=family, max_shard_bytes=150_000)
    expected = {
        "gate_up": layers["mlp"]["gate_up"].nbytes,
        "embedding": params["embed"]["embedding"].nbytes,
        "qkv": sum(layers["attn"][name].nbytes for name in ("q", "k", "v")),
    }
    assert (memory.made, memory.peak) == (len(leaves), expected[together])
    assert memory.peak == max(expected.values()) < 0.5 * sum(leaf.nbytes for leaf in leaves)
    save_pretrained(tmp_path / "whole", model, params, family=family, max_shard_bytes=150_000)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "lazy" / file.name).read_bytes()
    assert len(tensors(tmp_path / "lazy")) > len(leaves)
    assert_same_tree(from_pretrained(tmp_path / "lazy")[1], params)


def test_weights_of_a_directory_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params, max_shard_bytes=150_000)
    read: list[str] = []
    original: Callable[..., np.ndarray] = directory.WeightFiles.read
    monkeypatch.setattr(directory.WeightFiles, "read", lambda files, name: read.append(name) or original(files, name))
    with open_pretrained(tmp_path / "hf", dtype="bfloat16", compute_dtype="bfloat16") as (opened, leaves):
        assert read == [] and opened.config.compute_dtype == "bfloat16"
        assert leaves["embed"]["embedding"].dtype.name == "bfloat16"
        assert leaves["final_norm"]["scale"].read().dtype.name == "bfloat16"
        assert read == ["model.norm.weight"]
    with open_pretrained(tmp_path / "hf") as (_, leaves):
        assert jax.tree.map(lambda leaf: leaf.shape, leaves) == jax.tree.map(lambda leaf: leaf.shape, params)
        assert_same_tree(jax.tree.map(as_numpy, leaves), params)


def test_arrays_and_lazy_ones_are_taken_alike() -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    for leaf in (array, jax.numpy.asarray(array), lazy(array)):
        made = lazy(leaf)
        assert (made.shape, made.dtype, made.size, made.nbytes) == ((2, 3), np.float16, 6, 12)
        assert lazy(made) is made
        np.testing.assert_array_equal(made.read(), array)
        np.testing.assert_array_equal(as_numpy(leaf), array)

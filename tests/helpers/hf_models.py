"""A small model with random weights, and ways to read and bend the Hugging Face directory that holds one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

NEEDS_TORCH = "the peer is transformers on torch: pip install -e '.[torch]'"
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def small_config(**settings: Any) -> ByteConfig:
    return ByteConfig(**(SMALL | {"compute_dtype": "float32"} | settings))


def random_model(**settings: Any) -> tuple[ByteTransformer, dict[str, Any]]:
    model = ByteTransformer(small_config(**settings))
    numbers = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda leaf: np.float32(0.2) * numbers.standard_normal(leaf.shape, "f4") + np.float32(0.1), param_shapes(model)
    )


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory; each must lie in one file alone."""
    found: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():
                assert name not in found
                found[name] = handle.get_tensor(name)
    return found


def assert_same_tree(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = directory / "model.safetensors"
    held = {name: tensor.copy() for name, tensor in load_file(path).items()}
    change(held)
    save_file(held, path, metadata={"format": "pt"})


def save_words(directory: Path, words: list[str], **config: Any) -> Path:
    """A tokenizer of whole words, whose ids are their places."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory

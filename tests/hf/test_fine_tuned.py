"""Directories that programs of fine-tuning leave, which are no whole model, or not under the usual names."""

from pathlib import Path

import numpy as np
import pytest
from helpers.hf_models import edit_tensors, random_model

from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "hf", *random_model(num_hidden_layers=1))
    return tmp_path / "hf"


def test_a_prefix_of_all_names_shows(directory: Path) -> None:
    """As files have that were saved from a compiled model, or with an adapter that was not merged."""

    def prefixed(held: dict[str, np.ndarray]) -> None:
        for name in list(held):
            held[f"_orig_mod.{name}"] = held.pop(name)

    edit_tensors(directory, prefixed)
    message = r"config\.json: missing model\.embed_tokens\.weight; unknown _orig_mod\.lm_head\.weight; missing .* more$"
    with pytest.raises(ValueError, match=message):
        from_pretrained(directory)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_not_passed_over(alone: bool, directory: Path) -> None:
    """Transformers would apply it to the weights beside it."""
    (directory / "adapter_config.json").write_text("{}")
    if alone:
        (directory / "config.json").unlink()
        (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds an adapter of PEFT \(adapter_config\.json\), .*: load it onto its base"
    ):
        from_pretrained(directory)

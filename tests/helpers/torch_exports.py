"""Exports with the modelling file in transformers, each made and loaded once for the tests that only read it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.hf_models import NEEDS_TORCH

# Calls of a text of 24 tokens in parts, one by one at the end of the windows.
PARTS = ((0, 7), (7, 10), *((t, t + 1) for t in range(10, 16)), (16, 23), (23, 24))


@contextlib.contextmanager
def modules_in(folder: Path) -> Iterator[Path]:
    """Inside it transformers keeps copies of modelling files in the folder."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    torch.set_num_threads(1)  # threads cost more than such a model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(str(folder / "modules"))
        yield folder


def load(directory: Path, **options: Any) -> Any:
    """The model of a directory, of the class that lies there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)
    assert type(model).__name__ == "StellarByteForCausalLM"
    return model.eval()


def logits_of(peer: Any, tokens_BT: np.ndarray, **options: Any) -> np.ndarray:
    """float32 logits [B, T, V]."""
    import torch

    with torch.no_grad():
        tokens = torch.from_numpy(np.asarray(tokens_BT, np.int64)).to(peer.device)
        return peer(tokens, **options).logits.float().cpu().numpy()


class Exports:
    """Of the models of a file of tests, by their names."""

    def __init__(self, folder: Path, export: Callable[..., Any]):
        """``export(name, directory, **options)`` writes one below the folder, when it is asked for first."""
        self._folder, self._export = folder, export
        self._directories: dict[Any, Path] = {}
        self._peers: dict[Any, Any] = {}

    def directory(self, name: str, **options: Any) -> Path:
        """That of a model, which no test writes into."""
        key = (name, *sorted(options.items()))
        if key not in self._directories:
            self._directories[key] = self._folder / str(len(self._directories))
            self._export(name, self._directories[key], **options)
        return self._directories[key]

    def peer(self, name: str, attention: str = "sdpa") -> Any:
        """It in transformers, which no test changes."""
        if (name, attention) not in self._peers:
            self._peers[name, attention] = load(self.directory(name), attn_implementation=attention)
        return self._peers[name, attention]

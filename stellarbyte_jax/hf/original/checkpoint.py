"""Files of the original's checkpoints: safetensors, and what ``torch.save`` wrote.

The latter are pickles. They are read by torch's loader for weights alone, which makes tensors and plain values and runs
nothing else; there is no other way to read them here.
"""

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from stellarbyte_jax.config.foreign import absent, clipped, listed, shown

# Where the original's trainers put the weights in a checkpoint, beside the optimizer's state and the like.
_CONTAINERS = ("model_state", "model_state_dict", "model", "state_dict")
# Put before names, in any order and number, by torch.compile and by data parallelism.
_WRAPPERS = ("_orig_mod", "module")
_READABLE = ("F64", "F32", "F16", "BF16")
_SAVE = "save the weights alone, with torch.save(model.state_dict(), NEW.pth)"


@dataclass(frozen=True)
class _Stored:
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class OriginalFile:
    """The tensors of a checkpoint by name, without the names of wrappers."""

    def __init__(self, path: Path, stored: Mapping[str, _Stored]) -> None:
        """Raises ValueError where two tensors have the same name but for wrappers."""
        self.path = path
        self._stored: dict[str, _Stored] = {}
        for name, each in stored.items():
            own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            if own in self._stored:
                raise ValueError(f"{path}: two tensors are {clipped(own)} but for the names of wrappers: keep one")
            self._stored[own] = each

    def names(self) -> list[str]:
        """Every tensor."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: each.shape for name, each in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, whole."""
        return self._stored[name].read()

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name."""
        self._stored[new] = self._stored.pop(old)


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[OriginalFile]:
    """Opens a file; its tensors are read when they are asked for.

    Raises:
      ImportError: the file is torch's, and torch is not installed.
      ValueError: the file is missing or unreadable, or holds something else than the weights of a model.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the file with the weights in it, such as {path}/NAME.pth")
    if not path.is_file():
        raise ValueError(absent(path))
    with contextlib.ExitStack() as stack:
        stored = _safetensors(path, stack) if path.suffix == ".safetensors" else _torch(path)
        yield OriginalFile(path, stored)


def _safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        handle: Any = stack.enter_context(safe_open(path, framework="np"))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({clipped(str(error))}): copy the file again"
        ) from error
    stored = {}
    for name in handle.keys():
        part = handle.get_slice(name)
        if part.get_dtype() not in _READABLE:
            raise ValueError(_not_floats(path, name, part.get_dtype()))
        stored[name] = _Stored(tuple(part.get_shape()), lambda name=name: handle.get_tensor(name))
    return stored


def _not_floats(path: Path, name: str, dtype: object) -> str:
    return f"{path}: tensor {clipped(name)} is stored as {dtype}, readable are {', '.join(_READABLE)}: {_SAVE}"


def _torch(path: Path) -> dict[str, _Stored]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"reading {path} needs torch: pip install torch, or give a safetensors file") from error
    stored = {}
    for name, value in _state_dict(_load(path), path).items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise ValueError(f"{path}: {shown(name)} is a {type(value).__name__}, not a tensor: {_SAVE}")
        stored[name] = _tensor(path, name, value)
    return stored


def _load(path: Path) -> Any:
    """What a file holds: tensors, in mapped memory where its format allows that, and plain values."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # a broken file ends in an error of any kind
        found = re.search(r"GLOBAL ([\w.]+)", str(error))  # in a message that advises to load the file without care
        if found:
            raise ValueError(
                f"{path} holds the Python object {clipped(found[1])}, which is not loaded because that can run code: "
                f"where you trust the file, load it with torch and {_SAVE}"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} holds a pickle of something else than weights, which is not read: {_SAVE}"
            ) from error
        reason = clipped(str(error).partition("\n")[0]) or "it ends too early"
        raise ValueError(f"{path} is not a readable file of torch.save ({reason}): copy it again") from error


def _state_dict(content: Any, path: Path) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the weights of a model: {_SAVE}")
    inner = next((content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping)), None)
    if inner is not None:
        return inner
    import torch

    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds {listed(content) or 'nothing'}: no tensors, and none of {', '.join(_CONTAINERS)}, where "
            f"the original keeps them: {_SAVE}"
        )
    return content


def _tensor(path: Path, name: str, tensor: Any) -> _Stored:
    import torch

    tensor = tensor.detach()
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(_not_floats(path, name, str(tensor.dtype).removeprefix("torch.")))
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{path}: tensor {clipped(name)} is no plain array: {_SAVE}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: tensor {clipped(name)} has more numbers than the file holds for it: {_SAVE}")

    def read() -> np.ndarray:
        plain = tensor.resolve_neg()
        if plain.dtype == torch.bfloat16:  # of which torch makes no numpy array
            return plain.contiguous().view(torch.int16).numpy().view(bfloat16)
        return plain.numpy()

    return _Stored(tuple(tensor.shape), read)

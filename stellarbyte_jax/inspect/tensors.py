"""What lies in a checkpoint, tensor by tensor, and how two of them differ."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from stellarbyte_jax.checkpoint.source import Source
from stellarbyte_jax.hf.files import SINGLE, WeightFiles
from stellarbyte_jax.hf.hub import ADAPTER_WEIGHTS
from stellarbyte_jax.model.trees import Params

_AT_ONCE = 1 << 22  # numbers that are float64 at the same time


@dataclass(frozen=True)
class Held:
    """A tensor that was not read yet.

    Attributes:
      shape: its axes.
      dtype: of its numbers, as the files or numpy call it.
      read: gives it; raises ValueError where its numbers are no plain floats, or are damaged.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


Tensors = Mapping[str, Held]  # by their names in the files, or by their paths in the tree of weights


@dataclass(frozen=True)
class Numbers:
    """The numbers of a tensor.

    Attributes:
      norm: root of the sum of squares.
      largest: largest magnitude.
      not_finite: how many are NaN or infinite, which ``norm`` and ``largest`` leave out.
    """

    norm: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class Difference:
    """A tensor that two checkpoints hold with other numbers.

    Attributes:
      name: of both.
      largest: magnitude of the largest difference; inf where one is not finite and the other is another.
      relative: norm of the difference by that of the first.
    """

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """How the second of two checkpoints differs from the first.

    Attributes:
      missing: tensors that only the first has.
      unexpected: tensors that only the second has.
      shapes: those of different shapes, with both.
      values: those with different numbers, the largest difference first.
      equal: how many are the same to the bit, whatever their dtypes.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    values: tuple[Difference, ...]
    equal: int

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.unexpected or self.shapes or self.values)


@contextlib.contextmanager
def open_tensors(source: Source, *, as_tree: bool) -> Iterator[Tensors]:
    """The tensors of a checkpoint.

    Args:
      source: a run, a Hugging Face directory of any family, known here or not, or an adapter of PEFT.
      as_tree: a directory's as the leaves that they become here, to compare it with a run; else as its files hold them.

    Raises:
      ValueError, CheckpointError: the checkpoint cannot be read.
    """
    if source.is_run or as_tree:
        yield _leaves(source.weights()[1])
        return
    with WeightFiles(source.path, single=ADAPTER_WEIGHTS if source.is_adapter else SINGLE) as files:
        yield {name: Held(files.shape(name), files.dtype(name), partial(files.read, name)) for name in files.names()}


def _leaves(tree: Params, prefix: str = "") -> dict[str, Held]:
    found: dict[str, Held] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = Held(value.shape, value.dtype.name, partial(np.asarray, value))
    return found


def numbers(array: np.ndarray) -> Numbers:
    """Facts of an array of floats."""
    squares, largest, not_finite = 0.0, 0.0, 0
    for part in _parts(array):
        finite = part[np.isfinite(part)]
        not_finite += part.size - finite.size
        squares += float(np.square(finite).sum())
        largest = max(largest, float(np.abs(finite).max(initial=0)))
    return Numbers(float(np.sqrt(squares)), largest, not_finite)


def compare(first: Tensors, second: Tensors) -> Comparison:
    """Compares two checkpoints, a pair of tensors at a time."""
    shapes, values, equal = [], [], 0
    for name in first:
        if name not in second:
            continue
        if first[name].shape != second[name].shape:
            shapes.append((name, first[name].shape, second[name].shape))
        elif (found := _difference(name, first[name].read(), second[name].read())) is None:
            equal += 1
        else:
            values.append(found)
    return Comparison(
        missing=tuple(name for name in first if name not in second),
        unexpected=tuple(name for name in second if name not in first),
        shapes=tuple(shapes),
        values=tuple(sorted(values, key=lambda found: -found.largest)),
        equal=equal,
    )


def _difference(name: str, one: np.ndarray, other: np.ndarray) -> Difference | None:
    squares, of_one, largest = 0.0, 0.0, 0.0
    for a, b in zip(_parts(one), _parts(other), strict=True):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if same.all():
            of_one += float(np.square(a[np.isfinite(a)]).sum())
            continue
        with np.errstate(invalid="ignore"):
            apart = np.abs(np.where(same, 0.0, a - b))
        apart = np.where(np.isnan(apart), np.inf, apart)
        largest = max(largest, float(apart.max()))
        squares += float(np.square(apart).sum())
        of_one += float(np.square(a[np.isfinite(a)]).sum())
    if largest == 0:
        return None
    return Difference(name, largest, float(np.sqrt(squares / of_one)) if of_one else float("inf"))


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _AT_ONCE):
        yield flat[start : start + _AT_ONCE].astype(np.float64)

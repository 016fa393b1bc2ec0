"""What ``convert inspect`` prints: the tensors of a checkpoint, or how two checkpoints differ."""

import math
import re
from collections.abc import Iterable, Sequence

from stellarbyte_jax.command import imports

with imports():
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stellarbyte_jax.checkpoint.source import find_source
    from stellarbyte_jax.inspect import numbers as words
    from stellarbyte_jax.inspect.tensors import Comparison, Held, Tensors, compare, numbers, open_tensors

_WIDTH = 160  # where the output is no terminal


def inspect_checkpoints(first: str, second: str | None, step: int | None, revision: str | None) -> bool:
    """Prints facts of a checkpoint or of the difference of two; returns whether the two are the same.

    Raises:
      ValueError, CheckpointError: one of them cannot be read.
    """
    source = find_source(first, step, revision)
    if second is None:
        with open_tensors(source, as_tree=False) as tensors:
            _print_facts(tensors)
        return True
    other = find_source(second)
    as_tree = source.is_run != other.is_run  # a run has no names of files
    with open_tensors(source, as_tree=as_tree) as one, open_tensors(other, as_tree=as_tree) as another:
        found = compare(one, another)
    _print_comparison(found, first, second)
    return found.is_same


def _print_facts(tensors: Tensors) -> None:
    shown = Table("tensor", "shape", "dtype")
    for name in ("size", "norm", "largest"):
        shown.add_column(name, justify="right")
    parameters, size, remarks = 0, 0, []
    for name in _in_order(tensors):
        held = tensors[name]
        parameters += math.prod(held.shape)
        size += _bytes(held)
        norm, largest, remark = _numbers(held)
        shown.add_row(Text(name), _shape(held.shape), held.dtype, words.of_bytes(_bytes(held)), norm, largest)
        if remark:
            remarks.append(f"{name}: {remark}")
    _console().print(shown)
    for remark in remarks:
        print(remark)
    print(f"{len(tensors):,} tensors, {parameters:,} numbers, {words.of_bytes(size)}")


def _numbers(held: Held) -> tuple[str, str, str]:
    try:
        found = numbers(held.read())
    except ValueError as error:
        return "–", "–", str(error)
    remark = f"not finite: {found.not_finite:,}" if found.not_finite else ""
    return f"{found.norm:.4g}", f"{found.largest:.4g}", remark


def _print_comparison(found: Comparison, first: str, second: str) -> None:
    for label, names in ((f"only in {first}", found.missing), (f"only in {second}", found.unexpected)):
        for name in _in_order(names):
            print(f"{label}: {name}")
    for name, one, other in found.shapes:
        print(f"other shapes: {name}: {_shape(one)} and {_shape(other)}")
    if found.values:
        shown = Table("other numbers", "largest difference", "norm of the difference / norm")
        for difference in found.values:
            shown.add_row(Text(difference.name), f"{difference.largest:.4g}", f"{difference.relative:.4g}")
        _console().print(shown)
    print(
        f"{found.equal:,} tensors are equal, {len(found.values):,} have other numbers, {len(found.shapes):,} other "
        f"shapes, {len(found.missing):,} and {len(found.unexpected):,} are in one alone"
    )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _bytes(held: Held) -> int:
    bits = re.search(r"\d+", held.dtype)  # of BF16, float8_e4m3fn, I64
    return math.prod(held.shape) * (int(bits[0]) // 8 if bits else 1)


def _in_order(names: Iterable[str]) -> list[str]:
    """Layer 2 before layer 10."""
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console

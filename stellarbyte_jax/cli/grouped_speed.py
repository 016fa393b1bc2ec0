"""What ``benchmark grouped_matmul`` measures: products of rows with the matrix of their group, and gradients.

Ours are the kernels ("pallas") and the product of blocks in plain XLA ("xla"); the peer is torch's grouped product.
What the card reaches at best is told by torch's product of all rows with one matrix ("dense").
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.launch.hardware import hardware_of

Result = dict[str, Any]
TORCH = "torch"
DENSE = "dense"
WAYS = ("pallas", "xla", TORCH)
LOADS = ("even", "half", "third")
_TRAINING = (16384, 131072)
_DECODING = (64, 256, 1024, 4096)
WEIGHT_SCALE = 0.02  # of the normal numbers in matrices
PRODUCTS = ("forward", "dx", "dw")
_SECONDS = 0.02  # that the calls of a repeat are to take
# About what an H100 reaches: whoever is slower takes longer.
_OPERATIONS, _BYTES = 5e14, 2.5e12
_WORST_ERROR = 0.02  # rounding to bfloat16 makes a tenth of it, of each block of a sum a quarter


class Shape(NamedTuple):
    """One measurement of ``--only``.

    Attributes:
      inputs: D of matrices [E, D, F].
      outputs: F.
      experts: E.
      rows: their numbers that are measured, each with the products of :func:`products`.
    """

    inputs: int
    outputs: int
    experts: int
    rows: tuple[int, ...]


def _named(*shapes: Shape) -> dict[str, Shape]:
    return {f"{shape.inputs}x{shape.outputs}x{shape.experts}": shape for shape in shapes}


ON_GPU = _named(
    Shape(2048, 1408, 64, _TRAINING),
    Shape(1408, 2048, 64, _TRAINING),
    Shape(1024, 1024, 64, (*_DECODING, *_TRAINING)),
    Shape(512, 1024, 64, _TRAINING),
    Shape(4096, 1536, 128, _TRAINING),
    Shape(2048, 768, 128, (*_DECODING, *_TRAINING)),
)
SMALL = _named(Shape(64, 128, 4, (128,)))  # without a GPU: whether everything runs
SHAPES = ON_GPU | SMALL


def products(rows: int) -> tuple[str, ...]:
    """What is measured with so many rows: the product, and where they are no batch of decoding both gradients."""
    return PRODUCTS[:1] if rows in _DECODING else PRODUCTS


def loads(experts: int, rows: int) -> dict[str, Any]:
    """Rows of each expert, int64 [E], by :data:`LOADS`: drawn evenly; one has half; a third have none."""
    with imports():
        import numpy as np

    random = np.random.default_rng(0)
    one, empty = experts // 3, random.permutation(experts)[: max(experts // 3, 1)]

    def drawn(count: int, without: Any) -> Any:
        shares = np.ones(experts)
        shares[without] = 0
        return random.multinomial(count, shares / shares.sum())

    half = drawn(rows - rows // 2, one)
    half[one] = rows // 2
    return {"even": drawn(rows, []), "half": half, "third": drawn(rows, empty)}


def choices(load: str, rows: int) -> int:
    """Choices of the tokens that make such a load: one expert can have half of the rows only where each has two.

    Blocks depend on it for batches of decoding alone: these are of tokens with eight choices as long as they can be.
    """
    return 8 if rows in _DECODING and load != "half" else 2


def calls(shape: Shape, rows: int) -> int:
    """How many calls a repeat has."""
    D, F, E, _ = shape
    seconds = max(_flops(shape, rows) / _OPERATIONS, 2 * (E * D * F + rows * (D + F)) / _BYTES)
    return max(2, min(200, round(_SECONDS / seconds)))


def figures(shape: Shape, rows: int, seconds: Sequence[float], error: float, device: str) -> Result:
    """What is told of one product.

    Args:
      shape: of it.
      rows: of it.
      seconds: of a call, by repeat.
      error: the worst one, see ``grouped_ours.worst_error``.
      device: its name, by which its peak is known.

    Returns:
      TFLOP/s (2 S D F), of the peak, and ``error`` where the product is wrong or was not what was timed.
    """
    rates = [_flops(shape, rows) / each for each in seconds]
    median, peak = statistics.median(rates), hardware_of(device)
    result: Result = {
        "tflops": _rounded(median / 1e12),
        "lowest": _rounded(min(rates) / 1e12),
        "highest": _rounded(max(rates) / 1e12),
        "repeats": len(rates),
    }
    if peak is not None:
        result["of_peak"] = round(median / peak.bfloat16_flops, 4)
    if not math.isfinite(error):
        return {**result, "error": "the result is not finite"}
    result["worst_error"] = float(f"{error:.2g}")
    if error > _WORST_ERROR:
        result["error"] = f"the result is wrong: by {error:.2g} of its largest sum, where {_WORST_ERROR} is the limit"
    elif result.get("of_peak", 0) > 1:
        result["error"] = "faster than the device can be: not all calls were made"
    return result


def _flops(shape: Shape, rows: int) -> float:
    return 2.0 * rows * shape.inputs * shape.outputs


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def measure(
    names: Sequence[str], peer: bool, run: Callable[[str, Sequence[str]], Result]
) -> Iterator[tuple[str, Result]]:
    """Measures ours, and then the peer.

    Args:
      names: of :data:`SHAPES`.
      peer: it is measured too.
      run: a worker, with these names.

    Yields:
      The rows of each shape with its name, again when the peer was measured.
    """
    found: dict[str, Result] = {}
    for worker in ("grouped_ours", *(["grouped_torch"] if peer else [])):
        found[worker] = run(worker, names)
        for name in names:
            yield name, _merged(name, found)


def _merged(name: str, found: Mapping[str, Result]) -> Result:
    """By rows, product and load: what each way gave, and how many times as fast the kernels are as each other way."""
    result: Result = {
        worker: {key: value for key, value in measured.items() if key != "shapes"} for worker, measured in found.items()
    }
    merged = result["rows"] = {}
    for rows in SHAPES[name].rows:
        for product in products(rows):
            for load in LOADS:
                of_load: Result = {}
                for measured in found.values():
                    of_load |= (
                        measured.get("shapes", {}).get(name, {}).get(str(rows), {}).get(product, {}).get(load, {})
                    )
                merged.setdefault(str(rows), {}).setdefault(product, {})[load] = of_load | _times(of_load)
    return result


def _times(ways: Mapping[str, Result]) -> dict[str, float]:
    rates = {way: result["tflops"] for way, result in ways.items() if "tflops" in result}
    ours = rates.pop("pallas", None)
    return {} if ours is None else {f"times_{way}": round(ours / rate, 3) for way, rate in rates.items() if rate}


def _ours(config: TrainConfig, steps: int, names: Sequence[str]) -> Result:
    del config, steps
    with imports():
        from stellarbyte_jax.cli.grouped_ours import measure_ours
    return measure_ours(names)


WORKERS = {"grouped_ours": _ours}

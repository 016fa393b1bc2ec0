"""The peer of ``benchmark grouped_matmul``: torch's grouped product on the same rows.

S rows in the order of experts, D inputs, F outputs, E experts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from stellarbyte_jax.cli.grouped_speed import (
    DENSE,
    SHAPES,
    TORCH,
    WEIGHT_SCALE,
    Result,
    Shape,
    calls,
    figures,
    loads,
    products,
)
from stellarbyte_jax.cli.measurements import REPEATS, tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig

_BLOCK = 64  # as in grouped_ours
_Product = Callable[[Any], Any]  # of the ends int32 [E] of groups


def _measure(config: TrainConfig, steps: int, names: Sequence[str]) -> Result:
    """Figures by shape, rows, product and load, on a GPU where there is one."""
    del config, steps
    with imports():
        import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    torch.manual_seed(0)
    shapes: Result = {}
    with torch.no_grad():
        for name in names:
            for rows in SHAPES[name].rows:
                of_rows = shapes.setdefault(name, {})[str(rows)] = _rows(SHAPES[name], rows, device, kind)
                told = {product: found["even"] for product, found in of_rows.items()}
                figure = {product: found.get("error", found.get("tflops")) for product, found in told.items()}
                tell(f"{name}, {rows} rows, even, torch: {figure}")
    return {"shapes": shapes, "on": f"torch {torch.__version__}, {kind}"}


def _rows(shape: Shape, rows: int, device: Any, kind: str) -> Result:
    with imports():
        import torch

    D, F, E, _ = shape
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x_SD, dy_SF = torch.randn(rows, D, **half), torch.randn(rows, F, **half)
    w_EDF = torch.randn(E, D, F, **half) * WEIGHT_SCALE
    made = grouped_products(x_SD, w_EDF, dy_SF)
    found: Result = {}
    for product in products(rows):
        for load, sizes in loads(E, rows).items():
            sizes_E = torch.as_tensor(sizes, device=device)
            ends_E = torch.cumsum(sizes_E, 0, dtype=torch.int32)
            owner_S = torch.repeat_interleave(torch.arange(E, device=device), sizes_E)
            try:
                out, count = made[product](ends_E), calls(shape, rows)
                error = worst_error(product, x_SD, w_EDF, dy_SF, owner_S, out)
                del out
                seconds = [_seconds(made[product], ends_E, count, device) for _ in range(REPEATS)]
                told = {**figures(shape, rows, seconds, error, kind), "calls": count}
            except RuntimeError as problem:  # of torch, for what it does not support
                told = {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
            found.setdefault(product, {})[load] = {TORCH: told}
        if (one := dense_products(x_SD, w_EDF, dy_SF).get(product)) is not None:
            one(None)
            seconds = [_seconds(one, None, calls(shape, rows), device) for _ in range(REPEATS)]
            told = figures(shape, rows, seconds, 0.0, kind)
            del told["worst_error"]  # it is not looked at
            found[product]["even"][DENSE] = told
    return found


def grouped_products(x_SD: Any, w_EDF: Any, dy_SF: Any) -> Mapping[str, _Product]:
    """The product and its gradients by the public function of torch, or in older ones by that behind it."""
    with imports():
        import torch

    functional: Any = torch.nn.functional
    grouped = functional.grouped_mm if hasattr(functional, "grouped_mm") else cast(Any, torch)._grouped_mm
    return {
        "forward": lambda ends_E: grouped(x_SD, w_EDF, offs=ends_E),
        "dx": lambda ends_E: grouped(dy_SF, w_EDF.transpose(-2, -1), offs=ends_E),
        "dw": lambda ends_E: grouped(x_SD.t(), dy_SF, offs=ends_E),
    }


def dense_products(x_SD: Any, w_EDF: Any, dy_SF: Any) -> Mapping[str, _Product]:
    """The same with the matrix of one expert for all rows. Gradients of matrices have no such: it would be one."""
    return {"forward": lambda _: x_SD @ w_EDF[0], "dx": lambda _: dy_SF @ w_EDF[0].T}


def _seconds(product: _Product, ends_E: Any, count: int, device: Any) -> float:
    """Seconds of a call, of so many that are queued one after another."""
    with imports():
        import torch

    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            product(ends_E)
        return (time.perf_counter() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        product(ends_E)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def worst_error(name: str, x_SD: Any, w_EDF: Any, dy_SF: Any, owner_S: Any, out: Any) -> float:
    """As ``grouped_ours.worst_error``, of torch's arrays."""
    with imports():
        import torch

    x_SD, w_EDF, dy_SF, out = (array.float() for array in (x_SD, w_EDF, dy_SF, out))
    _, D, F = w_EDF.shape
    a_D, b_F = (torch.randint(0, 2, (n,), device=out.device).float() * 2 - 1 for n in (D, F))
    if name == "forward":
        found, right = (out * b_F).sum(-1), (x_SD * (w_EDF * b_F).sum(-1)[owner_S]).sum(-1)
    elif name == "dx":
        found, right = (out * a_D).sum(-1), (dy_SF * (w_EDF * a_D[:, None]).sum(1)[owner_S]).sum(-1)
    else:
        found = ((out * b_F).sum(-1) * a_D).unflatten(1, (-1, _BLOCK)).sum(-1)
        terms_SB = (x_SD * a_D).unflatten(1, (-1, _BLOCK)).sum(-1) * (dy_SF * b_F).sum(-1, keepdim=True)
        right = torch.zeros_like(found).index_add_(0, owner_S, terms_SB)
    return float((found - right).abs().max() / right.abs().max())


WORKERS = {"grouped_torch": _measure}

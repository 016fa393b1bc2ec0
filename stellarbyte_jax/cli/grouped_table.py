"""The figures of ``benchmark grouped_matmul`` as a table in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from stellarbyte_jax.cli.grouped_speed import DENSE, LOADS, SHAPES, WAYS

_COLUMNS = (
    "D → F, experts",
    "rows",
    "product",
    "kernels",
    "of the peak",
    "torch",
    "times torch",
    "XLA",
    "times XLA",
    "one matrix",
)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each shape, number of rows and product, with the loads beside each other; "-" is what has no figure.

    Args:
      results: by shape, as ``grouped_speed.measure`` yields them.
    """
    lines = [_line((*_COLUMNS, "worst error")), _line(["---", "---:", "---", *["---:"] * (len(_COLUMNS) - 2)])]
    for name, result in results.items():
        D, F, E, _ = SHAPES[name]
        for rows, of_rows in result.get("rows", {}).items():
            for product, of_loads in of_rows.items():
                what = (f"{D:,} → {F:,}, {E}", f"{int(rows):,}", product)
                lines.append(_line((*what, *_figures([of_loads.get(load, {}) for load in LOADS]))))
    return "\n".join(lines)


def _figures(loads: Sequence[Mapping[str, Any]]) -> list[str]:
    def of_way(way: str, key: str, form: str) -> str:
        return _beside([load.get(way, {}).get(key) for load in loads], form)

    def times(way: str) -> str:
        return _beside([load.get(f"times_{way}") for load in loads], "{:.2f}")

    kernels, xla, torch = (of_way(way, "tflops", "{:.0f}") for way in WAYS)
    errors = [load.get(WAYS[0], {}).get("worst_error") for load in loads]
    worst = max((error for error in errors if error is not None), default=None)
    peak = of_way(WAYS[0], "of_peak", "{:.0%}")
    return [
        kernels,
        peak,
        torch,
        times("torch"),
        xla,
        times("xla"),
        _beside([loads[0].get(DENSE, {}).get("tflops")], "{:.0f}"),
        _beside([worst], "{:.1e}"),
    ]


def _beside(values: Sequence[float | None], form: str) -> str:
    """Values with slashes between them, or one "-" where there is none."""
    told = ["-" if value is None else form.format(value) for value in values]
    return " / ".join(told) if set(told) != {"-"} else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

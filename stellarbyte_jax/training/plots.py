"""Plots of a run's metrics as PNG images. They hold no text of a run: names and titles stand in the page."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

COLORS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e"),
    *("#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"),
)
DASHES = ("solid", "dashed", "dotted")  # of the runs past those that colors tell apart
MOST_POINTS = 2000  # of a curve; a plot is 800 pixels wide
_MARKED = 25  # curves of so few points show them
_LOG_RATIO = 50  # a scale whose values differ by more is logarithmic
_HALF_LIFE = 0.005  # of a series, after which a value counts half in the average
LEAST_SMOOTHED = 20

Scale = Literal["free", "zero", "share"]


def check(asked: str) -> None:
    """Raises ModuleNotFoundError, which names the extra, where plots cannot be made; ``asked`` says what needs them."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{asked} needs matplotlib, and {error.name} is not installed: pip install matplotlib"
        ) from error


@dataclass(frozen=True, eq=False)
class Curve:
    """``y`` over ``x``, both float64 [N].

    Attributes:
      look: a line; a thin one behind others; or a dashed one of a metric that is measured now and then.
      number: of the run, which chooses color and dashes.
      shade: in [0, 1], one of several curves of a run: from dark to light, in place of the run's color.
    """

    x: np.ndarray
    y: np.ndarray
    look: Literal["line", "thin", "rare"] = "line"
    number: int = 0
    shade: float | None = None


def smoothed(values: np.ndarray) -> np.ndarray | None:
    """An average of a series [N] that does not lag behind it; None where it is too short for one.

    Exponential from both sides: weights halve over 0.5 % of the series.
    """
    if len(values) < LEAST_SMOOTHED:
        return None
    (before, before_weights), (after, after_weights) = _summed(values), _summed(values[::-1])
    return (before + after[::-1]) / (before_weights + after_weights[::-1])


def _summed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each value of [N] and those before it, which count less and less, and the sums of their weights."""
    keep = 0.5 ** (1 / max(1.0, _HALF_LIFE * len(values)))
    total = weight = 0.0
    sums, weights = np.empty(len(values)), np.empty(len(values))
    for i, value in enumerate(values.tolist()):
        total, weight = keep * total + value, keep * weight + 1
        sums[i], weights[i] = total, weight
    return sums, weights


def decimated(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points of a curve: the least and the greatest of equal stretches, so that no spike is lost."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2 + 1).astype(int)
    parts = [(a, y[a:b]) for a, b in itertools.pairwise(edges.tolist())]
    index = np.unique([a + i for a, part in parts for i in (int(part.argmin()), int(part.argmax()))])
    return x[index], y[index]


def draw(curves: Sequence[Curve], x_label: str, x_end: float, scale: Scale = "free") -> bytes:
    """A PNG image of curves, 800 x 400 pixels.

    Args:
      curves: of one plot, at least one of them with a point; thin ones lie behind.
      x_label: what ``x`` is.
      x_end: where its axis, which begins at 0, ends.
      scale: of ``y``. share: of 1, in percent; zero: begins at 0; free: logarithmic where positive values differ much.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # pyright: ignore[reportMissingImports]

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what a user's matplotlibrc asks for: it may need programs that are not here
        figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.add_subplot()
        for curve in sorted(curves, key=lambda curve: curve.look != "thin"):
            x, y = decimated(curve.x, curve.y)
            axes.plot(x, y, **_style(curve, len(x)))
        axes.set_xlabel(x_label)
        axes.set_xlim(-0.01 * (x_end or 1.0), 1.02 * (x_end or 1.0))
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=_whole(curves)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        _set_scale(axes, curves, scale, FuncFormatter)
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def short(value: float) -> str:
    """A number of at most four digits, with k, M, B or T for thousands and more."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _style(curve: Curve, points: int) -> dict[str, Any]:
    import matplotlib  # pyright: ignore[reportMissingImports]

    color: Any = COLORS[curve.number % len(COLORS)]
    if curve.shade is not None:
        color = matplotlib.colormaps["viridis"](0.9 * curve.shade)
    style: dict[str, Any] = {"color": color, "linestyle": DASHES[curve.number // len(COLORS) % len(DASHES)]}
    if curve.look == "thin":
        return {**style, "linewidth": 1.0, "alpha": 0.35 if curve.shade is None else 0.7}
    if points <= _MARKED:
        style |= {"marker": "o", "markersize": 4}
    if curve.look == "rare":
        return {**style, "linewidth": 1.0, "linestyle": "dashed", "markerfacecolor": "white"}
    return {**style, "linewidth": 1.6}


def _set_scale(axes: Any, curves: Sequence[Curve], scale: Scale, formatter: Any) -> None:
    if scale != "free":
        in_percent = formatter(lambda value, _: f"{short(100 * value)}%")
        axes.yaxis.set_major_formatter(in_percent if scale == "share" else formatter(lambda value, _: short(value)))
        axes.set_ylim(bottom=0)
        return
    values = [curve.y for curve in curves if len(curve.y)]
    least, most = min(float(y.min()) for y in values), max(float(y.max()) for y in values)
    if least > 0 and most > _LOG_RATIO * least:
        axes.set_yscale("log")
        return
    axes.ticklabel_format(axis="y", useOffset=False)
    if most - least <= 1e-6 * abs(most):  # a constant, whose rounding is not to be seen
        axes.set_ylim(least - 0.1 * abs(least), most + 0.1 * abs(most) or 1.0)


def _whole(curves: Sequence[Curve]) -> bool:
    return all(bool(np.all(curve.x == np.floor(curve.x))) for curve in curves)

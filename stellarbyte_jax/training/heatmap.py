"""The load of every expert over a run as a picture: a panel for each layer with experts.

S lines, L layers with experts, E experts.
"""

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from stellarbyte_jax.training import plots
from stellarbyte_jax.training.loads import LOADS, Loads, read_loads
from stellarbyte_jax.training.telemetry import DEAD

HEATMAP = "router_load.png"  # in the run's directory
_MOST_COLUMNS = 200  # of a panel, which has as many pixels
_MOST_LAYERS = 128
_REACH = 2.0  # powers of two: the colors end at a quarter and at four times the fair share
_TICKS = {-2: "¼ or less", -1: "½", 0: "1: even", 1: "2", 2: "4 or more"}
_COLORS = 33  # few, so that the file is small; an odd number, so that one is at the fair share
_DEAD_COLOR = "#f5c400"


def write_heatmap(run_dir: Path) -> Path | None:
    """Writes ``router_load.png`` of a run; None where it has no loads.

    Raises:
      OSError: it cannot be written.
    """
    loads = read_loads(run_dir / LOADS, [])
    if loads is None:
        return None
    target = run_dir / HEATMAP
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(draw(loads))
    os.replace(partial, target)
    return target


def draw(loads: Loads) -> bytes:
    """A PNG image: steps to the right, experts downwards, as color the load over the fair share."""
    import matplotlib  # pyright: ignore[reportMissingImports]
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    edges, shares_SLE = thinned(loads.steps, loads.shares_SLE[:, :_MOST_LAYERS])
    _, L, E = shares_SLE.shape
    columns, rows, width, height = _grid(L, E)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # as for curves
        figure = Figure(figsize=(columns * width + 1.7, rows * height + 1.3), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        mesh = None
        for number, panel in enumerate(axes.flat):
            if number >= L:
                panel.set_axis_off()
                continue
            mesh = _panel(panel, edges, E * shares_SLE[:, number].T, f"layer {loads.layers[number]}")
            if number + columns >= L:  # the last one of its column
                panel.tick_params(labelbottom=True)
        _words(figure, axes, mesh, E, len(loads.layers))
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def thinned(steps: np.ndarray, shares_SLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches of lines, where there are more than a picture shows: edges [C + 1], shares [C, L, E].

    Edges are steps: a column reaches from the line before it to its last one.
    """
    cuts = np.linspace(0, len(steps), min(len(steps), _MOST_COLUMNS) + 1).astype(int)
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else 0.0
    edges = np.concatenate([[first], steps[cuts[1:] - 1]])
    sums = np.add.reduceat(shares_SLE, cuts[:-1], axis=0, dtype=np.float64)
    return edges, sums / np.diff(cuts)[:, None, None]


def _grid(layers: int, experts: int) -> tuple[int, int, float, float]:
    """Columns and rows of panels, and the inches of each, of 100 pixels: each of 800 experts has one at least."""
    columns = layers if layers <= 3 else math.ceil(math.sqrt(layers * 1.2))
    width = (6.0, 4.2, 3.6)[layers - 1] if layers <= 3 else 2.9
    return columns, math.ceil(layers / columns), width, min(max(2.4, 0.014 * experts), 12.0)


def _panel(panel: Any, edges: np.ndarray, ratios_EC: np.ndarray, title: str) -> Any:
    import matplotlib  # pyright: ignore[reportMissingImports]
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # pyright: ignore[reportMissingImports]

    logs = np.log2(np.clip(ratios_EC, 2**-_REACH, 2**_REACH))
    shown = np.ma.masked_array(logs, ratios_EC < DEAD)
    colors = matplotlib.colormaps["RdBu_r"].resampled(_COLORS).with_extremes(bad=_DEAD_COLOR)
    E = len(ratios_EC)
    rows = np.arange(E + 1) - 0.5
    mesh = panel.pcolormesh(edges, rows, shown, cmap=colors, vmin=-_REACH, vmax=_REACH)
    panel.set_facecolor(_DEAD_COLOR)
    panel.set_ylim(E - 0.5, -0.5)
    panel.set_title(title, fontsize=11)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plots.short(value)))
    panel.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 8, 10], integer=True))
    return mesh


def _words(figure: Any, axes: Any, mesh: Any, experts: int, layers: int) -> None:
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    left_out = f", the first {_MOST_LAYERS} of {layers} layers" if layers > _MOST_LAYERS else ""
    figure.suptitle(f"Load of each expert over the run{left_out}", fontsize=14)
    figure.supxlabel("optimizer step", fontsize=11)
    figure.supylabel("number of the expert", fontsize=11)
    bar = figure.colorbar(mesh, ax=axes, aspect=30, pad=0.02)
    bar.set_label(f"share of the choices /\nfair share (1/{experts})", fontsize=11)
    bar.set_ticks(list(_TICKS), labels=list(_TICKS.values()))
    dead = Patch(facecolor=_DEAD_COLOR, label=f"below {DEAD:.0%} of the fair share")
    figure.legend(handles=[dead], loc="outside lower right", frameon=False, fontsize=10)

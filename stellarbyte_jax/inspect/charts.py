"""Charts of a report as PNG, with matplotlib, which the extra ``report`` brings.

Figures are made without pyplot: they need no display and change no global state.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stellarbyte_jax.config import ByteConfig, LayerSpec
from stellarbyte_jax.inspect.costs import PARTS, ParameterCounts
from stellarbyte_jax.inspect.fonts import find_font, usable_language
from stellarbyte_jax.inspect.labels import Language, label
from stellarbyte_jax.inspect.numbers import factor, percent, short
from stellarbyte_jax.inspect.sparsity import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

# Distinguishable with every kind of colour blindness (Okabe and Ito 2008); light enough for black text.
COLOURS = {
    "embedding": "#56B4E9",
    "attention": "#E69F00",
    "mlp": "#4DBF99",
    "router": "#E8926B",
    "experts": "#8FB3E8",
    "shared_experts": "#A3D977",
    "norms": "#CC79A7",
    "head": "#F0E442",
    "other": "#BBBBBB",
}
_SMALL = 0.02  # share below which a slice has no room for a number
_MOST_RUNS = 6  # boxes of layers in the diagram
_MOST_NUMBERED = 40  # layers whose numbers can be read in the heat map
_TALLEST = 40.0  # inches; a PNG has at most 2^16 rows


def require_matplotlib() -> None:
    """Raises ImportError, with what to install, where charts cannot be drawn."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install matplotlib") from error


class Canvas:
    """One chart: its figure, axes and language."""

    def __init__(self, width: float, height: float, language: Language, **axes: Any) -> None:
        """Makes an empty figure of so many inches.

        Raises:
          ImportError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
        from matplotlib.font_manager import FontProperties  # pyright: ignore[reportMissingImports]
        from matplotlib.layout_engine import ConstrainedLayoutEngine  # pyright: ignore[reportMissingImports]

        self.language: Language = usable_language(language)
        path = find_font(self.language)
        self.font = FontProperties(fname=None if path is None else str(path))
        self.figure = Figure(
            figsize=(width, height), dpi=144, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        )
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_subplot(**axes)

    def word(self, key: str, *values: object) -> str:
        """A label in the language that the chart can show."""
        return label(key, self.language, *values)

    def text(self, size: float) -> dict[str, Any]:
        """Arguments of a text of this size."""
        font = self.font.copy()
        font.set_size(size)
        return {"fontproperties": font}

    def title(self, key: str) -> None:
        """The title of the chart."""
        self.axes.set_title(self.word(key), pad=14, **self.text(14))

    def png(self) -> bytes:
        """The chart."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def parameter_pie(counts: ParameterCounts, language: Language) -> bytes:
    """Parameters by part."""
    canvas = Canvas(8.0, 4.4, language)
    parts, total = counts.parts, counts.total
    wedges, *_ = canvas.axes.pie(
        list(parts.values()),
        colors=[COLOURS[part] for part in parts],
        startangle=90,
        counterclock=False,
        wedgeprops={"edgecolor": "white", "linewidth": 1.5, "width": 0.62},
    )
    for wedge, count in zip(wedges, parts.values(), strict=True):
        if count / total >= _SMALL:
            angle = math.radians((wedge.theta1 + wedge.theta2) / 2)
            x, y = 0.69 * math.cos(angle), 0.69 * math.sin(angle)
            canvas.axes.text(x, y, f"{100 * count / total:.0f} %", ha="center", va="center", **canvas.text(10))
    told = [canvas.word("params_of", short(total)).replace(" ", "\n")]
    if counts.active != total:
        told.append(canvas.word("active_of", short(counts.active)))
    canvas.axes.text(0, 0, "\n".join(told), ha="center", va="center", **canvas.text(12 if len(told) == 1 else 9.5))
    names = [f"{canvas.word(part)}: {short(count)} ({percent(count / total)})" for part, count in parts.items()]
    canvas.figure.legend(
        wedges, names, loc="outside right center", frameon=False, prop=canvas.text(10.5)["fontproperties"]
    )
    canvas.title("pie_title")
    return canvas.png()


@dataclass(frozen=True)
class _Run:
    """Consecutive layers that are alike: the first and last number, what they see, parameters of each."""

    first: int
    last: int
    spec: LayerSpec
    parts: Mapping[str, int]


def structure_diagram(config: ByteConfig, counts: ParameterCounts, language: Language) -> bytes:
    """The network from bottom to top, one box for each run of layers that are alike."""
    runs = _runs(config, counts)
    shown = runs if len(runs) <= _MOST_RUNS else [*runs[: _MOST_RUNS - 1], None, runs[-1]]
    canvas = Canvas(7.6, 2.6 + (1.25 if config.parallel_residual else 2.05) * len(shown), language)
    axes, word = canvas.axes, canvas.word
    y = _box(canvas, 0.0, 0.6, "#EEEEEE", word("tokens_in"), word("vocabulary") + f" {config.vocab_size:,}")
    y = _box(canvas, y, 0.6, COLOURS["embedding"], word("embedding"), _with(counts.outside, "embedding"))
    if counts.outside.get("experts"):
        y = _box(canvas, y, 0.6, COLOURS["experts"], word("pool"), _with(counts.outside, "experts"))
    for run in shown:
        y = _gap(canvas, y) if run is None else _layers(canvas, y, config, run)
    if counts.outside.get("norms"):
        y = _box(canvas, y, 0.6, COLOURS["norms"], word("final_norm"), _with(counts.outside, "norms"))
    head = word("shared") if config.tie_word_embeddings else _with(counts.outside, "head")
    y = _box(canvas, y, 0.6, COLOURS["head"], word("head"), head)
    _box(canvas, y, 0.6, "#EEEEEE", word("logits_out"), f"{config.vocab_size:,}", last=True)
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.2, y + 0.8)
    axes.axis("off")
    canvas.title("diagram_title")
    return canvas.png()


def _runs(config: ByteConfig, counts: ParameterCounts) -> list[_Run | None]:
    runs: list[_Run | None] = []
    for number, (spec, parts) in enumerate(zip(config.layer_specs, counts.layers, strict=True)):
        before = runs[-1] if runs else None
        if before is not None and (before.spec, before.parts) == (spec, parts):
            runs[-1] = _Run(before.first, number, spec, parts)
        else:
            runs.append(_Run(number, number, spec, parts))
    return runs


def _with(parts: Mapping[str, int], part: str) -> str:
    return short(parts.get(part, 0))


def _rectangle(canvas: Canvas, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch  # pyright: ignore[reportMissingImports]

    canvas.axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor="#555555"
        )
    )


def _arrow(canvas: Canvas, y: float, length: float) -> None:
    canvas.axes.annotate(
        "", (5, y + length), (5, y), arrowprops={"arrowstyle": "-|>", "color": "#555555", "shrinkA": 0, "shrinkB": 0}
    )


def _box(canvas: Canvas, y: float, height: float, colour: str, name: str, size: str, *, last: bool = False) -> float:
    """A box with an arrow above; returns where the next one begins."""
    _rectangle(canvas, 2.2, y, 5.6, height, colour)
    canvas.axes.text(2.5, y + height / 2, name, ha="left", va="center", **canvas.text(10.5))
    canvas.axes.text(7.5, y + height / 2, size, ha="right", va="center", **canvas.text(10.5))
    if not last:
        _arrow(canvas, y + height, 0.3)
    return y + height + 0.3


def _gap(canvas: Canvas, y: float) -> float:
    canvas.axes.text(5, y + 0.3, "· · ·", ha="center", va="center", **canvas.text(14))
    _arrow(canvas, y + 0.6, 0.3)
    return y + 0.9


def _layers(canvas: Canvas, y: float, config: ByteConfig, run: _Run) -> float:
    word, count = canvas.word, run.last - run.first + 1
    beside = config.parallel_residual
    above = 0.0 if beside else 1.15  # attention first, then the MLP
    _rectangle(canvas, 0.4, y, 9.2, 1.5 + above, "#F7F7F7")
    numbers = f"{run.first}" if count == 1 else f"{run.first}-{run.last}"
    size = short(sum(run.parts.values()))
    size = word("times", count, size) if count > 1 else size
    m = config.moe
    if "experts" in run.parts:
        idle = run.parts["experts"] // m.num_experts * (m.num_experts - m.num_experts_per_tok)
        size = word("with_active", size, short(sum(run.parts.values()) - idle))
    canvas.axes.text(0.7, y + above + 1.24, f"{word('layer')} {numbers}", ha="left", va="center", **canvas.text(10.5))
    canvas.axes.text(9.3, y + above + 1.24, size, ha="right", va="center", **canvas.text(10.5))
    kind = _attention_kind(canvas, run.spec)
    heads = word("heads_of", config.num_attention_heads, config.kv_heads, config.head_size)
    inner = (
        ("attention", f"{word('attention')}: {kind}", f"{heads}   {short(run.parts.get('attention', 0))}"),
        _experts(canvas, config, run.parts)
        if run.spec.moe
        else ("mlp", word("mlp"), f"{config.hidden_size} × {config.mlp_size}   {short(run.parts.get('mlp', 0))}"),
    )
    for place, (part, name, size) in enumerate(inner):
        x, width = (0.7 + 4.4 * place, 4.2) if beside else (0.7, 8.6)
        bottom = y + 0.15 + (0.0 if beside else above * place)
        _rectangle(canvas, x, bottom, width, 0.85, COLOURS[part])
        for text, height in ((name, 0.64), (size, 0.23)):
            canvas.axes.text(x + width / 2, bottom + height, text, ha="center", va="center", **canvas.text(9.5))
    if not beside:
        _arrow(canvas, y + 1.0, 0.3)
    _arrow(canvas, y + above + 1.5, 0.3)
    return y + above + 1.8


def _experts(canvas: Canvas, config: ByteConfig, parts: Mapping[str, int]) -> tuple[str, str, str]:
    """Part, name and size of the box of a layer's experts."""
    m = config.moe
    key = "experts_and_shared" if m.n_shared_experts else "experts_chosen"
    name = canvas.word(key, m.num_experts_per_tok, m.num_experts, m.n_shared_experts)
    size = f"{config.hidden_size} × {config.expert_size}"
    if not m.shared_pool:
        size += f"   {short(parts.get('experts', 0) + parts.get('shared_experts', 0))}"
    return "experts", name, f"{size}   {canvas.word('router_of', short(parts.get('router', 0)))}"


def _attention_kind(canvas: Canvas, spec: LayerSpec) -> str:
    if spec.memory_slots:
        return canvas.word("memory_attention", spec.memory_slots)
    return canvas.word("full_attention") if spec.window is None else canvas.word("window_attention", spec.window)


def deviation_heatmap(statistics: Statistics, language: Language) -> bytes:
    """Standard deviation of the weights of each layer and part; one column of what is outside of the layers."""
    rows = list(statistics.layers)
    parts = [part for part in PARTS if any(part in of_parts for of_parts in (*rows, statistics.outside))]
    many = len(rows) > _MOST_NUMBERED
    height = min(_TALLEST, max(3.2, 1.6 + (0.12 if many else 0.3) * (len(rows) + 1)))
    canvas = Canvas(1.9 + 1.15 * len(parts), height, language)
    grid = np.full((len(rows) + 1, len(parts)), np.nan)
    for y, of_parts in enumerate((*rows, statistics.outside)):
        for x, part in enumerate(parts):
            if part in of_parts:
                grid[y, x] = of_parts[part].std
    image = canvas.axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="viridis")
    if not many:
        _cell_texts(canvas, grid, image)
    canvas.axes.set_xticks(range(len(parts)), [canvas.word(part) for part in parts], **canvas.text(10))
    numbers = range(0, len(rows), max(5, len(rows) // _MOST_NUMBERED)) if many else range(len(rows))
    ticks = [*numbers, len(rows)]
    canvas.axes.set_yticks(ticks, [*map(str, numbers), canvas.word("outside")], **canvas.text(9))
    canvas.axes.set_ylabel(canvas.word("layer"), rotation=0, ha="right", labelpad=14, **canvas.text(10.5))
    canvas.figure.colorbar(image, ax=canvas.axes)
    canvas.title("heatmap_title")
    return canvas.png()


def _cell_texts(canvas: Canvas, grid: np.ndarray, image: Any) -> None:
    """The numbers, dark ones on light cells."""
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "black" if image.norm(value) > 0.6 else "white"
            canvas.axes.text(x, y, f"{value:.2g}", ha="center", va="center", color=colour, **canvas.text(8.5))


def comparison_radar(ratios: Mapping[str, float], language: Language) -> bytes:
    """A model beside a reference: the circle is 1, and equal factors are equal distances.

    Args:
      ratios: this model's value over the reference's, by the key of a label.
      language: of the labels.
    """
    canvas = Canvas(6.2, 5.6, language, projection="polar")
    axes: Any = canvas.axes
    logs = np.log2(list(ratios.values()))
    reach = max(1, math.ceil(np.abs(logs).max()))
    angles = np.linspace(0, 2 * np.pi, len(logs), endpoint=False)
    around = np.append(angles, angles[0])
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.plot(np.linspace(0, 2 * np.pi, 181), np.zeros(181), color="#555555", linestyle="--", linewidth=1.2)
    axes.plot(around, np.append(logs, logs[0]), color="#0072B2", linewidth=2, marker="o", markersize=4)
    axes.fill(around, np.append(logs, logs[0]), color="#0072B2", alpha=0.2)
    axes.set_ylim(-reach - 0.5, reach + 0.5)
    step = max(1, math.ceil(reach / 3))
    rings = [n for n in range(-reach, reach + 1) if n % step == 0]
    axes.set_yticks(
        rings, [f"{2.0**n:g}×" if n >= 0 else f"1/{2**-n}×" for n in rings], color="#555555", **canvas.text(8)
    )
    axes.set_rlabel_position(180 / len(logs))
    axes.set_axisbelow(False)  # labels of the rings lie over the line
    for ring in axes.get_yticklabels():
        ring.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8})
    names = [f"{canvas.word(key)}\n{factor(ratio)}" for key, ratio in ratios.items()]
    axes.set_xticks(angles, names, **canvas.text(10))
    axes.tick_params(axis="x", pad=14)
    canvas.title("radar_title")
    return canvas.png()

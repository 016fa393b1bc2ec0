"""The report of a run, or of several side by side: one HTML page that needs no other file."""

import base64
import html
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.config.paths import real
from stellarbyte_jax.config.reference import changed, written
from stellarbyte_jax.training import heatmap, plots
from stellarbyte_jax.training.plots import Curve, Scale
from stellarbyte_jax.training.record import (
    AXES,
    Axis,
    Continuation,
    Record,
    Series,
    read_record,
    setting,
)

REPORT = "report.html"  # in the run's directory
_MOST_PLOTS, _MOST_ROUNDS = 60, 50
_LONGEST_TEXT = 5000  # characters of a sample
_UNPRINTABLE = "\n\t\u3000\xa0\u200c\u200d"  # what texts hold nevertheless: spaces, and joiners of characters


@dataclass(frozen=True)
class _Plot:
    """A plot of its own, of the metric ``name``."""

    name: str
    title: str
    scale: Scale = "free"
    smooth: bool = False
    beside: str | None = None  # a metric that is measured more rarely, dashed


_PLOTS = (
    _Plot("loss", "Training loss", smooth=True, beside="validation/loss"),
    _Plot("validation/loss", "Validation loss"),
    _Plot("learning_rate", "Learning rate", "zero"),
    _Plot("gradient_norm", "Gradient norm", smooth=True),
    _Plot("tokens_per_second", "Tokens a second", "zero", smooth=True),
    _Plot("padding", "Share of padding", "share", smooth=True),
)
_FURTHER = {  # titles of metrics that come after those; what layers tell stands under its own name
    "cross_entropy": "Cross entropy",
    "accuracy": "Training accuracy",
    "validation/accuracy": "Validation accuracy",
    "validation/perplexity": "Validation perplexity",
    "validation/bits_per_byte": "Validation bits per byte",
    "mfu": "Model FLOP utilisation (causal attention)",
    "mfu_full_attention": "Model FLOP utilisation (attention counted in full)",
    "peak_memory_gib": "Peak device memory (GiB)",
    "router/load_entropy": "Evenness of the experts' load (entropy; 1: even)",
    "router/max_load": "Load of the busiest expert over the mean",
    "router/max_wanted": "Choices for the most wanted expert over the mean",
    "router/overflow_rate": "Choices that another expert took, or none",
    "router/drop_rate": "Choices that no expert took",
    "router/dead_experts": "Dead experts of a layer",
    "router/idle_experts": "Experts of a layer without a token in a step",
    "router/temperature": "Temperature of the routers",
}
_SHARES = (
    *("accuracy", "validation/accuracy", "mfu", "mfu_full_attention", "router/overflow_rate", "router/drop_rate"),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 0 auto; padding: 1em 2em 4em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin: 2em 0 .6em; }
.note, figcaption span, .about { color: #666; } .note { margin: .2em 0; } .about { margin-top: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1em 2em; }
figure { margin: 0; } figure img { width: 100%; height: auto; } figcaption { font-weight: 600; }
figcaption span { font-weight: 400; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { border-bottom: 1px solid #ddd; padding: .3em 1.2em .3em 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; max-width: 44em; }
.same { color: #888; }
.legend { position: sticky; top: 0; background: #fff; padding: .4em 0; }
.legend span { display: inline-block; margin-right: 1.6em; }
.legend i { display: inline-block; width: 2em; border-top: 3px; margin-right: .5em; vertical-align: middle; }
.heat img { max-width: 100%; height: auto; }
.sample { margin: .4em 0 1em; white-space: pre-wrap; overflow-wrap: anywhere; } .sample b { color: #06c; }
"""


def make_page(directories: Sequence[Path], x: Axis = "steps") -> tuple[str, list[str]]:
    """The page, and what is missing in it or was left out, a line each.

    Args:
      directories: of runs; with more than one, their curves lie over each other.
      x: what curves are drawn over: optimizer steps, tokens without padding, or time of training.

    Raises:
      ValueError: a directory holds no metrics, or none over ``x``; or it is given twice.
      ModuleNotFoundError: matplotlib is not installed.
    """
    plots.check("a report")
    records = [read_record(path, name) for path, name in zip(directories, _names(directories), strict=True)]
    return _page(records, x), [note for record in records for note in record.notes]


def write_page(output: Path, page: str) -> None:
    """Writes it in one step: a reader never finds half of it. Raises OSError where that fails."""
    partial = output.with_name(output.name + ".partial")
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, output)


def _names(directories: Sequence[Path]) -> list[str]:
    """What the runs are called: the names of their folders, or where those are equal, their paths."""
    places = [real(path) for path in directories]
    if len(set(places)) < len(places):
        raise ConfigError("a run is given twice: name each once")
    names = [place.name for place in places]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, directories, strict=True)]


def _page(records: Sequence[Record], x: Axis) -> str:
    title = " and ".join(record.name for record in records)
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
    )
    notes = [note for record in records for note in record.notes]
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return "\n".join(
        [
            head,
            f'<h1>{_text(title)}</h1><p class="about">made {made}</p>',
            _legend(records),
            *(f'<p class="note">{_text(note)}</p>' for note in notes),
            "<h2>Final numbers</h2>" + _table(records, _numbers(records)),
            "<h2>Course</h2>" + _figures(records, x),
            *(_loads(record, several=len(records) > 1) for record in records if record.loads is not None),
            "<h2>Settings that differ from their defaults</h2>" + _settings(records),
            "<h2>Environment of the last start</h2>" + _table(records, _environment(records), compare=True),
            *(_samples(record, several=len(records) > 1) for record in records if record.samples),
            "</body></html>\n",
        ]
    )


def _text(value: object) -> str:
    """Escaped for the page; control characters, and those that turn the direction of writing, are spelled out."""
    text = "".join(c if c.isprintable() or c in _UNPRINTABLE else repr(c)[1:-1] for c in str(value))
    return html.escape(text)


def _legend(records: Sequence[Record]) -> str:
    if len(records) == 1:
        return ""
    entries = []
    for number, record in enumerate(records):
        color = plots.COLORS[number % len(plots.COLORS)]
        dashes = plots.DASHES[number // len(plots.COLORS) % len(plots.DASHES)]
        entries.append(
            f'<span><i style="border-top-style:{dashes};border-color:{color}"></i>{_text(record.name)}</span>'
        )
    return f'<p class="legend">{"".join(entries)}</p>'


def _table(records: Sequence[Record], rows: Iterable[tuple[str, Sequence[str]]], *, compare: bool = False) -> str:
    """Rows of a name and one text a run; to compare runs, those that tell them apart come first, the others grey."""
    heads = "".join(f"<th>{_text(record.name)}</th>" for record in records) if len(records) > 1 else ""
    lines = [f"<tr><th></th>{heads}</tr>"] if heads else []
    told = [(compare and len(cells) > 1 and len(set(cells)) == 1, name, cells) for name, cells in rows]
    for same, name, cells in sorted(told, key=lambda row: row[0]):
        opened = '<tr class="same">' if same else "<tr>"
        lines.append(f"{opened}<th>{_text(name)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>' if lines else '<p class="note">not known</p>'


def _numbers(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, Callable[[Record], str | None]]] = [
        ("steps done", _steps),
        ("tokens (without padding)", lambda r: _end(r, "tokens", lambda v: f"{v:,.0f}")),
        ("time of training", lambda r: _end(r, "time", _duration)),
        ("parameters", lambda r: _whole(r.about.get("parameters"))),
        ("active parameters", _active),
        ("training loss", lambda r: _last(r, "loss", "{:.4f}")),
        ("best validation loss", _best),
        ("last validation loss", lambda r: _last(r, "validation/loss", "{:.4f}")),
        ("last validation perplexity", lambda r: _last(r, "validation/perplexity", "{:,.2f}")),
        ("last validation bits per byte", lambda r: _last(r, "validation/bits_per_byte", "{:.4f}")),
        ("last validation accuracy", lambda r: _last(r, "validation/accuracy", "{:.1%}")),
        ("tokens a second (median)", lambda r: _median(r, "tokens_per_second")),
        ("peak device memory", lambda r: _last(r, "peak_memory_gib", "{:.1f} GiB")),
    ]
    made = [(name, [spell(record) for record in records]) for name, spell in rows]
    return [(name, ["–" if x is None else x for x in cells]) for name, cells in made if any(cells)]


def _active(record: Record) -> str | None:
    """Those that one token uses, where they are not all."""
    active = record.about.get("active_parameters")
    return None if active == record.about.get("parameters") else _whole(active)


def _steps(record: Record) -> str:
    done = f"{max(float(np.nanmax(s.at['steps'])) for s in record.series.values()):,.0f}"
    return done if record.config is None else f"{done} of {record.config.steps:,}"


def _end(record: Record, axis: Axis, spell: Callable[[float], str]) -> str | None:
    known = [s.at[axis][np.isfinite(s.at[axis])] for s in record.series.values()]
    return spell(max(float(x.max()) for x in known if len(x))) if any(map(len, known)) else None


def _last(record: Record, name: str, form: str) -> str | None:
    value = record.last(name)
    return None if value is None else form.format(value)


def _best(record: Record) -> str | None:
    series = record.series.get("validation/loss")
    if series is None:
        return None
    best = int(np.argmin(series.values))
    return f"{series.values[best]:.4f} (step {series.at['steps'][best]:,.0f})"


def _median(record: Record, name: str) -> str | None:
    return f"{np.median(record.series[name].values):,.0f}" if name in record.series else None


def _whole(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) and abs(value) < 2**63 else None


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _settings(records: Sequence[Record]) -> str:
    configs = [record.config for record in records]
    names = dict.fromkeys(name for config in configs if config is not None for name in changed(config))
    rows = [(name, ["–" if c is None else clipped(written(setting(c, name)), 500) for c in configs]) for name in names]
    return _table(records, rows, compare=True)


def _environment(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    facts = [found if isinstance(found := r.about.get("environment"), dict) else {} for r in records]
    names = list(dict.fromkeys(name for found in facts for name in found))[:50]
    return [(clipped(name), [clipped(str(f.get(name, "–"))) for f in facts]) for name in names]


def _samples(record: Record, *, several: bool) -> str:
    rounds: dict[int, list[Continuation]] = {}
    for sample in record.samples:
        rounds.setdefault(sample.step, []).append(sample)
    steps = sorted(rounds, reverse=True)
    parts = [f"<h2>Samples{f' of {_text(record.name)}' if several else ''}</h2>"]
    for step in steps[:_MOST_ROUNDS]:
        texts = [
            f'<p class="sample"><b>{_text(s.prompt[:_LONGEST_TEXT])}</b>{_text(s.text[:_LONGEST_TEXT])}</p>'
            for s in rounds[step]
        ]
        opened = " open" if step == steps[0] else ""
        parts.append(f"<details{opened}><summary>step {step:,}</summary>{''.join(texts)}</details>")
    if len(steps) > _MOST_ROUNDS:
        parts.append(f'<p class="note">{len(steps) - _MOST_ROUNDS} earlier rounds are in samples.jsonl</p>')
    return "".join(parts)


def _loads(record: Record, *, several: bool) -> str:
    assert record.loads is not None
    title = f"Load of experts{f' of {_text(record.name)}' if several else ''}"
    return f'<h2>{title}</h2><p class="heat"><img alt="{title}" src="{_source(heatmap.draw(record.loads))}"></p>'


def _source(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _figures(records: Sequence[Record], x: Axis) -> str:
    for record in records:
        if not any(np.isfinite(series.at[x]).any() for series in record.series.values()):
            raise ValueError(
                f"{record.name}: no line of its metrics.jsonl has {AXES[x]!r}, since an earlier version began the run: "
                "draw over steps"
            )
    end = max(float(np.nanmax(s.at[x], initial=0)) for r in records for s in r.series.values())
    label, unit = _axis(x, end)
    others = dict.fromkeys(_group(name) for record in records for name in sorted(record.series))
    others = [name for name in others if name not in {plot.name for plot in _PLOTS} and _tells(name, records)]
    wanted = [*_PLOTS, *(_further(name) for name in others)]
    made = []
    for plot in wanted:
        curves = [
            c
            for number, record in enumerate(records)
            for c in _curves(record, plot, x, unit, number, alone=len(records) == 1)
        ]
        if any(len(curve.x) for curve in curves) and len(made) < _MOST_PLOTS:
            made.append(_figure(plot, plots.draw(curves, label, end / unit, plot.scale), _caption(records, plot)))
    return f'<div class="grid">{"".join(made)}</div>'


def _further(name: str) -> _Plot:
    return _Plot(
        name,
        _FURTHER.get(name, name),
        "share" if name in _SHARES else "free",
        smooth=not name.startswith("validation/"),
    )


def _tells(name: str, records: Sequence[Record]) -> bool:
    """Whether a metric tells more than others: with no further loss, the cross entropy is the loss."""
    if name != "cross_entropy":
        return name != "target_tokens"  # padding says it, whatever the size of a batch
    pairs = [(r.series[name], r.series["loss"]) for r in records if name in r.series and "loss" in r.series]
    return not all(np.array_equal(a.values, b.values) for a, b in pairs)


def _figure(plot: _Plot, image: bytes, caption: str) -> str:
    title = _text(clipped(plot.title))
    return (
        f"<figure><figcaption>{title} <span>{caption}</span></figcaption>"
        f'<img alt="{title}" src="{_source(image)}" width="800" height="400"></figure>'
    )


def _axis(x: Axis, end: float) -> tuple[str, float]:
    """The axis' label, and what its numbers, of which ``end`` is the last, are divided by."""
    if x != "time":
        return ("optimizer step" if x == "steps" else "tokens (without padding)"), 1.0
    unit, seconds = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if end >= 2 * s or s == 1)
    return f"time of training ({unit})", float(seconds)


def _group(name: str) -> str:
    """Entries of a vector, ``load/0`` and so on, share a plot."""
    stem, _, index = name.rpartition("/")
    return stem if stem and index.isdecimal() else name


def _curves(record: Record, plot: _Plot, x: Axis, unit: float, number: int, *, alone: bool) -> list[Curve]:
    names, found = _entries(record, plot, alone=alone), []
    several, whole = len(names) > 1, plot.name in record.series
    for index, name in enumerate(names):
        at, values = _points(record.series[name], x, unit)
        mean = plots.smoothed(values) if plot.smooth and not several else None
        shade = index / (len(names) - 1) if several and alone else None
        behind = mean is not None or (several and whole)
        found.append(Curve(at, values, "thin" if behind else "line", number, shade))
        if mean is not None:
            found.append(Curve(at, mean, "line", number))
    if several and whole:
        found.append(Curve(*_points(record.series[plot.name], x, unit), "line", number))
    if plot.beside in record.series:
        found.append(Curve(*_points(record.series[plot.beside], x, unit), "rare", number))
    return found


def _entries(record: Record, plot: _Plot, *, alone: bool) -> list[str]:
    """The metrics of a plot: one, or the entries of a vector in their order.

    Where a metric stands for its entries, those are seen in the page of one run alone.
    """
    names = [name for name in record.series if name != plot.name and _group(name) == plot.name]
    if plot.name in record.series and (len(names) < 2 or not alone):
        return [plot.name]
    return sorted(names, key=lambda name: (len(name), name))  # load/2 before load/10


def _points(series: Series, x: Axis, unit: float) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(series.at[x])
    return series.at[x][known] / unit, series.values[known]


def _caption(records: Sequence[Record], plot: _Plot) -> str:
    """What a reader must know of the curves: averaging, thinning, shades."""
    entries = [_entries(record, plot, alone=len(records) == 1) for record in records]
    longest = max(len(r.series[name].values) for r, names in zip(records, entries, strict=True) for name in names)
    parts = []
    if plot.beside is not None and any(plot.beside in record.series for record in records):
        parts.append("dashed: validation")
    if plot.smooth and longest >= plots.LEAST_SMOOTHED and min(map(len, entries)) < 2:
        parts.append("thick: average over about 1 % of the run")
    if longest > plots.MOST_POINTS:
        parts.append(f"{plots.MOST_POINTS:,} of {longest:,} points: the least and the greatest of each stretch")
    if len(records) == 1 and len(entries[0]) > 1:
        what = "thick: all layers; thin: layers" if plot.name in records[0].series else "entries"
        first, last = (entries[0][at].rpartition("/")[2] for at in (0, -1))
        parts.append(f"{what} {first} (dark) to {last} (light)")
    return "; ".join(parts)

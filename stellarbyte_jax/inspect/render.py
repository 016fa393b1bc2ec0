"""A report as Markdown with charts beside it, or as one HTML page that holds everything and runs nothing."""

import base64
import html
import re
from collections.abc import Mapping

from stellarbyte_jax.inspect.report import Report, Section, Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #bbb; padding: .3rem .7rem; text-align: right; }
th { background: #f0f0f0; }
th:first-child, td:first-child { text-align: left; }
td.short { white-space: nowrap; }
img { max-width: 100%; }
p.note { color: #555; }
""".strip()
_SHORT = 16  # characters of a cell that stays on one line
_PLAIN = re.compile(r"([\\`*_{}\[\]<>#|!&~])")


def to_markdown(report: Report, charts: Mapping[str, str]) -> str:
    """Markdown of a report; ``charts`` are addresses of images by their keys."""
    lines = [f"# {_escaped(report.title)}"]
    for section in report.sections:
        lines += ["", f"## {_escaped(section.title)}"]
        for table in section.tables:
            lines += ["", *_markdown_table(table)]
        for note in section.notes:
            lines += ["", _escaped(note)]
        for chart in section.charts:
            if chart in charts:
                lines += ["", f"![{_escaped(section.title)}]({charts[chart]})"]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    rule = [":--", *["--:"] * (len(table.columns) - 1)]
    rows = [tuple(map(_escaped, row)) for row in (table.columns, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], tuple(rule), *rows[1:])]


def _escaped(text: str) -> str:
    """Text that Markdown takes for itself, on one line."""
    return _PLAIN.sub(r"\\\1", " ".join(text.split()))


def to_html(report: Report, charts: Mapping[str, bytes]) -> str:
    """One HTML page with its charts, PNG, inside. It has no scripts and refers to nothing outside of itself."""
    language = {"en": "en", "zh": "zh-Hans"}[report.language]
    body = [f"<h1>{html.escape(report.title)}</h1>", *(_html_section(s, charts) for s in report.sections)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="{language}">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(report.title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>\n",
        ]
    )


def _html_section(section: Section, charts: Mapping[str, bytes]) -> str:
    title = html.escape(section.title)
    parts = [f"<h2>{title}</h2>", *map(_html_table, section.tables)]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
    for chart in section.charts:
        if chart in charts:
            data = base64.b64encode(charts[chart]).decode()
            parts.append(f'<p><img alt="{title}" src="data:image/png;base64,{data}"></p>')
    return "\n".join(["<section>", *parts, "</section>"])


def _html_table(table: Table) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{kind(cell)}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    def kind(cell: str) -> str:  # a number is not to break at its sign or before its unit
        return ' class="short"' if len(cell) <= _SHORT else ""

    return "\n".join(["<table>", row(table.columns, "th"), *(row(cells, "td") for cells in table.rows), "</table>"])

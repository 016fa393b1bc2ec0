"""Draws the report of a run, or lays several runs over each other."""

from collections.abc import Sequence
from pathlib import Path

from stellarbyte_jax.cli.program import local_path, new_parser
from stellarbyte_jax.command import command, imports, remedy
from stellarbyte_jax.config import ConfigError

with imports():
    from stellarbyte_jax.training.record import AXES
    from stellarbyte_jax.training.report import REPORT, make_page, write_page


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, writes the page and says where it is."""
    parser = new_parser(
        "report",
        "Write a page with the plots, settings and samples of a run; several runs lie over each other.",
        "runs/quickstart",
        "runs/a runs/b --x time --output comparison.html",
    )
    parser.add_argument("run", nargs="+", type=local_path, metavar="RUN", help="a run's output_dir")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE.html", help=f"default: RUN/{REPORT}, of several runs ./{REPORT}"
    )
    parser.add_argument("--x", choices=list(AXES), default="steps", help="what curves are drawn over (default: steps)")
    options = parser.parse_args(arguments)
    output = options.output or (options.run[0] / REPORT if len(options.run) == 1 else Path(REPORT))
    if output.suffix != ".html":
        raise ConfigError(f"--output {output} is a page, and replaces a file of that name: let the name end in .html")
    page, notes = make_page(options.run, options.x)
    try:
        write_page(output, page)
    except OSError as error:
        advice = remedy(error, "folder with --output") or "choose another one with --output"
        raise OSError(f"{output} could not be written: {error.strerror or error}; {advice}") from error
    for note in notes:
        print(f"note: {note}")
    print(f"report: {output}")
    return 0

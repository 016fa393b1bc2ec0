"""Tells what a model is and costs, on the terminal or as a report with charts."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stellarbyte_jax.cli.program import also_spelled, inherit, local_path, new_parser, path_or_name, positive
from stellarbyte_jax.command import command, imports, remedy, spelled
from stellarbyte_jax.config import ByteConfig, TrainConfig, load
from stellarbyte_jax.config.paths import real

with imports():
    import jax
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stellarbyte_jax.checkpoint.source import find_source
    from stellarbyte_jax.checkpoint.weights import load_weights
    from stellarbyte_jax.hf.directory import from_pretrained
    from stellarbyte_jax.inference.reconfigure import reconfigure
    from stellarbyte_jax.inspect import charts
    from stellarbyte_jax.inspect.labels import LANGUAGES
    from stellarbyte_jax.inspect.render import to_html, to_markdown
    from stellarbyte_jax.inspect.report import Measured, Report, ReportWriter, Section, Setup
    from stellarbyte_jax.inspect.sparsity import Statistics, weight_statistics
    from stellarbyte_jax.inspect.speed import measure_speed
    from stellarbyte_jax.launch import quiet_libraries
    from stellarbyte_jax.launch.compile_cache import CompileCache
    from stellarbyte_jax.model.decoder import ByteTransformer, init_params
    from stellarbyte_jax.model.trees import Params

_PROMPT, _NEW, _REPEATS = 128, 64, 3
_WIDTH = 140  # of tables where no terminal says how wide it is


@dataclass(frozen=True)
class _Subject:
    """What is told about: a model, with the settings of its run and its weights where there are any."""

    name: str
    model: ByteTransformer
    run: TrainConfig | None
    params: Params | None


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, counts, and prints tables or writes a report."""
    options = _parse(arguments)
    if options.output is not None:
        charts.require_matplotlib()
    quiet_libraries()
    if options.speed:
        CompileCache()
    else:
        jax.config.update("jax_platforms", "cpu")  # counting needs no accelerator
    subject = _subject(options)
    writer = ReportWriter(subject.model, _setup(options, subject), options.language)
    reference, reference_name = _reference(options)
    comparison, ratios = writer.comparison(reference, reference_name)
    statistics = None
    if options.weights and subject.params is not None:
        statistics = weight_statistics(subject.model.config, subject.params)
    sections = [writer.structure(), writer.parameters(), writer.flops(), *writer.memory(), comparison]
    if options.speed:
        sections.append(_speed(options, subject, writer))
    if statistics is not None:
        sections += writer.statistics(statistics)
    report = Report(writer.title(subject.name), options.language, tuple(sections))
    if options.output is None:
        _print(report)
    else:
        print(f"wrote {_write(options.output, options.format, report, _charts(writer, ratios, statistics))}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "info",
        "Tell what a model is and costs: parameters, memory, operations, statistics of its weights and, where asked "
        "for, its speed on this machine. Nothing but --speed needs an accelerator.",
        "--config configs/pretrain.py --set model.num_hidden_layers=24",
        "--model runs/quickstart --output report --format html",
        "--model path/to/hugging_face_directory --speed --batch-sizes 1 8 32",
        "--model owner/name --no-weights",
        settings=TrainConfig,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", type=path_or_name, metavar="DIR", help="a run, a Hugging Face directory, or owner/name of the hub"
    )
    source.add_argument("--config", metavar="FILE", help="a config file of training; no weights are needed")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model of the hub")
    parser.add_argument("--step", type=positive, metavar="N", help="checkpoint of the run (default: the newest)")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings to change: of the run with --config (model.hidden_size=512), of the loaded model with --model "
        "(cache.dtype=int8)",
    )
    parser.add_argument(
        "--weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the weights of --model for their statistics (default: yes)",
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="sequences of a training step at once")
    parser.add_argument("--length", type=positive, metavar="N", help="tokens of such a sequence")
    parser.add_argument("--cache-batch", type=positive, default=1, metavar="N", help="rows of the cache (default: 1)")
    parser.add_argument("--cache-length", type=positive, metavar="N", help="tokens of each (default: all positions)")
    parser.add_argument("--reference", metavar="FILE", help="config file to compare with (default: ByteConfig())")
    parser.add_argument("--speed", action="store_true", help="measure prompts and generation on this machine")
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", metavar="N", help="with --speed: numbers of rows (default: 1 8)"
    )
    parser.add_argument("--output", type=local_path, metavar="DIR", help="write a report with charts there, not tables")
    form = also_spelled({"markdown": "md", "htm": "html"})
    parser.add_argument("--format", type=form, choices=("md", "html"), help="with --output (default: md)")
    language = also_spelled({"english": "en", "chinese": "zh", "zh-cn": "zh", "cn": "zh"})
    parser.add_argument(
        "--language", type=language, choices=LANGUAGES, default="en", help="of tables and charts (default: en)"
    )
    options = parser.parse_args(arguments)
    for name, needs in (("batch_sizes", "speed"), ("format", "output"), ("step", "model"), ("revision", "model")):
        if getattr(options, name) is not None and not getattr(options, needs):
            parser.error(f"--{name.replace('_', '-')} belongs to --{needs}")
    return options


def _subject(options: argparse.Namespace) -> _Subject:
    if options.config is not None:
        run = load(options.config, options.set, inherit)
        return _Subject(Path(options.config).stem, ByteTransformer(run.model), run, None)
    weights = options.weights or options.speed
    source = find_source(options.model, options.step, options.revision, weights=weights)
    name, run, params = real(options.model).name, None, None
    if source.is_run:
        run, params = load_weights(source.path, source.step)
        network = run.model
        if network.lora.r:
            network, params = source.weights()
        name, model = source.path.resolve().name, ByteTransformer(network)
    elif weights:
        model, params = from_pretrained(source.path)
    else:
        model = ByteTransformer(source.model_config())
    return _Subject(name, reconfigure(model, options.set), run, params)


def _setup(options: argparse.Namespace, subject: _Subject) -> Setup:
    """The sizes that are told: those typed, else those of the run, else one row of all positions with AdamW."""
    run, positions = subject.run, subject.model.config.max_position_embeddings
    rows = 1 if run is None else run.global_batch_size // run.gradient_accumulation_steps
    return Setup(
        optimizer="adamw" if run is None else run.optimizer.name,
        rows=options.rows or rows,
        length=options.length or (positions if run is None else run.data.sequence_length),
        average=run is not None and run.ema_decay is not None,
        cache_batch=options.cache_batch,
        cache_length=options.cache_length or positions,
    )


def _reference(options: argparse.Namespace) -> tuple[ByteConfig, str]:
    if options.reference is None:
        return ByteConfig(), "ByteConfig(), 768 x 12"
    return load(options.reference).model, Path(options.reference).stem


def _speed(options: argparse.Namespace, subject: _Subject, writer: ReportWriter) -> Section:
    model, params = subject.model, subject.params
    if params is None:
        params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    sizes = options.batch_sizes or [1, 8]
    prompt = min(_PROMPT, max(1, model.config.max_position_embeddings - _NEW))
    new = min(_NEW, max(1, model.config.max_position_embeddings - prompt))
    speeds = list(measure_speed(model, params, sizes, prompt_length=prompt, new_tokens=new, repeats=_REPEATS))
    device = jax.devices()[0].device_kind
    return writer.speed(Measured(speeds, prompt, new, _REPEATS, device, fresh_weights=subject.params is None))


def _charts(writer: ReportWriter, ratios: dict[str, float], statistics: Statistics | None) -> dict[str, bytes]:
    """PNG files by the keys that sections name."""
    language = writer.language
    made = {
        "structure": charts.structure_diagram(writer.config, writer.counts, language),
        "parameters": charts.parameter_pie(writer.counts, language),
        "comparison": charts.comparison_radar(ratios, language),
    }
    if statistics is not None:
        made["deviations"] = charts.deviation_heatmap(statistics, language)
    return made


def _write(directory: Path, form: str | None, report: Report, made: dict[str, bytes]) -> Path:
    """Writes ``report.html``, or ``report.md`` with a file for each chart; earlier ones of these names are replaced."""
    path = directory / ("report.html" if form == "html" else "report.md")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if form == "html":
            path.write_text(to_html(report, made), encoding="utf-8")
        else:
            for name, png in made.items():
                (directory / f"{name}.png").write_bytes(png)
            path.write_text(to_markdown(report, {name: f"{name}.png" for name in made}), encoding="utf-8")
    except OSError as error:
        advice = remedy(error, "--output") or "mend that"
        raise OSError(f"{path} could not be written: {error.strerror or error}; {advice}") from error
    return path


def _print(report: Report) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(spelled(report.title))
    for section in report.sections:
        console.print()
        for number, table in enumerate(section.tables):
            shown = Table(title=Text(section.title) if number == 0 else None, title_justify="left")
            for column, name in enumerate(table.columns):
                shown.add_column(Text(name), justify="left" if column == 0 else "right")
            for row in table.rows:
                shown.add_row(*map(Text, row))
            console.print(shown)
        for note in section.notes:
            console.print(note)

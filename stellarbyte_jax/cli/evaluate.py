"""Evaluates a model on tasks of lm-eval."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from stellarbyte_jax.cli.program import DTYPES, add_model, also_spelled, local_path, new_parser, positive
from stellarbyte_jax.command import command, imports, make_directory, remedy
from stellarbyte_jax.config import ByteConfig

with imports():
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stellarbyte_jax.checkpoint.bundle import load_bundle
    from stellarbyte_jax.evaluation.adapter import as_lm, require_lm_eval
    from stellarbyte_jax.evaluation.tasks import Result, check_tasks, evaluate_tasks, to_json
    from stellarbyte_jax.inference.reconfigure import reconfigure
    from stellarbyte_jax.launch import environment, quiet_libraries
    from stellarbyte_jax.launch.compile_cache import CompileCache

_BATCH_SIZE = 32
_LARGE = 1e6  # a number that is told with an exponent
_TELL_EVERY = 10.0  # seconds
_WIDTH = 140  # of the table where no terminal says how wide it is


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, evaluates and returns the exit code."""
    options = _parse(arguments)
    require_lm_eval()
    if options.output is not None:
        make_directory(options.output.parent, "--output")
    CompileCache()
    quiet_libraries()
    check_tasks(options.tasks)
    overrides = options.set + ([f"compute_dtype={options.compute_dtype}"] if options.compute_dtype else [])
    bundle = load_bundle(options.model, options.step, revision=options.revision)
    bundle = replace(bundle, model=reconfigure(bundle.model, overrides))
    results = evaluate_tasks(
        as_lm(bundle, batch_size=options.batch_size, progress=_teller()),
        options.tasks,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        chat=options.chat,
    )
    _print(results)
    if options.output is not None:
        about = {name: getattr(options, name) for name in ("model", "step", "limit", "num_fewshot", "chat", "set")}
        about |= {"compute_dtype": bundle.model.config.compute_dtype, "on": environment()}
        try:
            options.output.write_text(to_json(results, about) + "\n", encoding="utf-8")
        except OSError as error:
            advice = remedy(error, "--output") or "choose another --output"
            raise OSError(f"{options.output} could not be written: {error.strerror or error}; {advice}") from error
        print(f"wrote {options.output}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "evaluate",
        "Evaluate a model on tasks of lm-eval, by name or from a YAML or JSON file. Needs the extra eval.",
        "--model runs/quickstart --tasks lambada_openai,arc_easy --limit 200",
        "--model path/to/hugging_face_directory --tasks my_task.yaml --num-fewshot 5 --output results.json",
        settings=ByteConfig,
    )
    add_model(parser)
    parser.add_argument(
        "--tasks",
        type=_names,
        required=True,
        metavar="NAME_OR_FILE,..",
        help="as lm-eval names them, or files of tasks",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")
    parser.add_argument(
        "--batch-size", type=positive, default=_BATCH_SIZE, metavar="N", help="requests at once (default: %(default)s)"
    )
    parser.add_argument(
        "--num-fewshot", type=_not_negative, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--chat", action="store_true", help="prompts go through the model's chat template")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="write results as JSON too")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--compute-dtype", type=also_spelled(DTYPES), choices=dtypes, help="default: the model's")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other settings of the model, such as rope_scaling.name=yarn rope_scaling.factor=4",
    )
    return parser.parse_args(arguments)


def _teller() -> Callable[[str, int, int], None]:
    """Tells how far requests are, every few seconds, on standard error, which is silenced while lm-eval runs."""
    errors, told = sys.stderr, time.monotonic()

    def tell(kind: str, done: int, total: int) -> None:
        nonlocal told
        if done in (0, total) or time.monotonic() - told >= _TELL_EVERY:
            told = time.monotonic()
            print(f"{kind}: {done:,} of {total:,}", file=errors, flush=True)

    return tell


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name: separate names by single commas")
    return names


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 0")
    return int(text)


def _print(results: Sequence[Result]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    shown = Table()
    for number, column in enumerate(("task", "metric", "value", "stderr", "documents")):
        shown.add_column(column, justify="left" if number < 2 else "right")
    for result in results:
        cells = (result.task, result.metric, _cell(result.value), _cell(result.stderr), _cell(result.samples))
        shown.add_row(*map(Text, cells))
    console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < _LARGE else f"{value:.4e}"

"""Trains a model, or continues a run."""

import argparse
import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stellarbyte_jax.cli.program import inherit, load_settings, new_parser, positive, typed
from stellarbyte_jax.command import command, imports
from stellarbyte_jax.config import TrainConfig, load
from stellarbyte_jax.config.reference import listed, matching

if TYPE_CHECKING:
    from stellarbyte_jax.training.run import Finished


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the training and says what can be done next."""
    options = _parse(arguments)
    if options.plan:
        return _plan(options)
    with imports():
        from stellarbyte_jax.launch import processes
    processes.join(options.coordinator, options.processes, options.process)
    with processes.failing_together():
        config = load_settings(options.config, options.set)
    with imports():
        from stellarbyte_jax.training.guard import run_guarded
        from stellarbyte_jax.training.run import train

    def run() -> int:
        finished = train(config)
        if finished.exit_code == 0 and processes.is_main():
            print(next_commands(config, finished, options))
        return finished.exit_code

    return run_guarded(run, config.output_dir)


def _plan(options: argparse.Namespace) -> int:
    with imports():
        from stellarbyte_jax.cli.plan import prepare_backend, print_plan
    prepare_backend(options)
    return print_plan(load(options.config, options.set, inherit), options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "train",
        "Train a model, or continue a run. Typed again, the same command continues an unfinished run.",
        "--config configs/quickstart.py",
        "--config pretrain --init-from path/to/hugging_face_directory --set data.train=more.jsonl output_dir=runs/more",
        "--config pretrain --set 'data.train=my_corpus/train/*.jsonl' model.hidden_size=512 steps=1000",
        "--config pretrain --plan --devices 8 --device-kind H100",
        settings=TrainConfig,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a Python file with `def config() -> TrainConfig`, the name of one that comes with the package, or the "
        "train_config.json of a run",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.name=value", help="settings to change"
    )
    parser.add_argument(
        "--init-from",
        metavar="DIR",
        help="begin with the weights, the model and the tokenizer of a run, RUN/checkpoints/STEP, a Hugging Face "
        "directory or owner/name of the hub; the same as --set init_from=DIR",
    )
    parser.add_argument(
        "--list-settings",
        nargs="?",
        const="",
        action=_ListSettings,
        metavar="PATTERN",
        help="print the settings whose name or meaning holds a text, or all, and leave",
    )
    several = parser.add_argument_group(
        "several processes",
        "One command for each, with the same settings; a job of Slurm, Open MPI or Kubernetes needs none of these. "
        "STELLARBYTE_COORDINATOR, STELLARBYTE_PROCESSES and STELLARBYTE_PROCESS are the same.",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port of it")
    several.add_argument("--processes", type=positive, metavar="N", help="how many processes there are")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what the run would take of each device (memory, operations, exchanges, time) and which mesh suits "
        "it, and leave; starts nothing and reads no data",
    )
    parser.add_argument(
        "--devices", type=positive, metavar="N", help="with --plan: so many devices (default: those of mesh, or there)"
    )
    parser.add_argument(
        "--device-kind",
        metavar="NAME",
        help="with --plan: H100, H200 or A100 (default: H100, or without --devices the GPU that is there)",
    )
    parser.add_argument("--json", action="store_true", help="with --plan: print JSON, not tables")
    options = parser.parse_args(arguments)
    for name in ("devices", "device_kind", "json"):
        if getattr(options, name) and not options.plan:
            parser.error(f"--{name.replace('_', '-')} belongs to --plan")
    if options.init_from is not None:
        options.set.append(f"init_from={options.init_from}")
    return options


class _ListSettings(argparse.Action):
    """Prints settings and ends the program, as ``--help`` does, whatever else is missing."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: str | None = None
    ) -> None:
        del namespace, option
        chosen = matching(values)
        if not chosen:
            parser.error(f"no setting matches {values!r}")
        print(listed(chosen))
        parser.exit()


def next_commands(config: TrainConfig, finished: "Finished", options: argparse.Namespace) -> str:
    """The commands that make sense after the run, to copy and paste."""
    with imports():
        from stellarbyte_jax.hf.export import export_family

    directory = str(Path(config.output_dir))
    directory = f"./{directory}" if directory.startswith("-") else directory  # else an option
    run, prompt = shlex.quote(directory), config.sample_prompts[0] if config.sample_prompts else "Once upon a time"
    asked = shlex.quote(f"--prompt={prompt}") if prompt.startswith("-") else f"--prompt {shlex.quote(prompt)}"
    lines = [
        "next:",
        f"  go on:     {typed('train')} {_longer(config, finished, options)}",
        f"  generate:  {typed('generate')} --model {run} {asked} --temperature 0.8 --top-p 0.95",
    ]
    if not config.report_at_end:
        lines.append(f"  report:    {typed('report')} {run}")
    with contextlib.suppress(ValueError):
        export_family(config.model)
        lines.append(f"  convert:   {typed('convert')} to-hf {run} {shlex.quote(directory + '-hf')}")
    return "\n".join(lines)


def _longer(config: TrainConfig, finished: "Finished", options: argparse.Namespace) -> str:
    """What was typed, with more of what ended the run."""
    more = {}
    if finished.ended_by == "patience":
        more["evaluation.patience"] = 2 * (config.evaluation.patience or 1)
    elif finished.ended_by == "data":
        more["data.epochs"] = 2 * (config.data.epochs or 1)
    else:
        more["steps"] = 2 * max(config.steps, finished.step)
    last = {setting.partition("=")[0].strip(): setting for setting in options.set}  # goes before those of its name
    kept = [setting for name, setting in last.items() if name not in more]
    settings = [*kept, *(f"{name}={value}" for name, value in more.items())]
    return f"--config {shlex.quote(options.config)} --set {' '.join(map(shlex.quote, settings))}"

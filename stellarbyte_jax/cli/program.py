"""Names of the commands, and how to write them for the user who typed one of them."""

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.config import ConfigError, TrainConfig, load
from stellarbyte_jax.config.files import read
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.config.section import Section
from stellarbyte_jax.interrupts import imports


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      module: in this package.
      script: file name in ``scripts/``.
      summary: for the list of commands.
      options: that it adds to what is typed.
    """

    module: str
    script: str
    summary: str
    options: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train", "train.py", "train a model, or continue a run"),
    "generate": Command("generate", "generate.py", "continue prompts"),
    "chat": Command("generate", "generate.py", "talk to a model whose tokenizer has a chat template", ("--chat",)),
    "evaluate": Command("evaluate", "evaluate.py", "measure a model on tasks of lm-eval"),
    "convert": Command("convert", "convert.py", "checkpoints to and from the Hugging Face format"),
    "report": Command("report", "report.py", "a page with the plots of a run, or of several"),
    "tokenizer": Command("tokenizer", "train_tokenizer.py", "train a tokenizer"),
    "prepare": Command("prepare", "prepare_data.py", "tokenize data once, before training"),
    "info": Command("info", "model_info.py", "tell what a model is and costs"),
    "benchmark": Command("benchmark", "benchmark.py", "measure speed on this machine"),
    "doctor": Command("doctor", "doctor.py", "look at this machine before a run"),
}


def typed(name: str) -> str:
    """A command as this process was started: a script of the repository, or the console command.

    ``python scripts/generate.py`` where ``python scripts/train.py`` was typed, ``stellarbyte generate`` elsewhere.
    """
    script = Path(sys.argv[0])
    if script.name in {each.script for each in COMMANDS.values()}:
        return f"python {shlex.quote(str(script.with_name(COMMANDS[name].script)))}"
    return f"stellarbyte {name}"


def new_parser(name: str, description: str, *examples: str, settings: type[Section] | None = None) -> Parser:
    """A parser of the arguments of a command, whose help ends with examples to copy.

    Args:
      name: of the command.
      description: of what it does.
      examples: arguments.
      settings: those that its ``--set`` takes.
    """
    lines = "".join(f"\n  {typed(name)} {example}" for example in examples)
    return Parser(
        settings=settings,
        prog=typed(name),
        description=description,
        epilog=f"examples:{lines}" if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def path_or_name(text: str) -> str:
    """An option that is a path, or a path or a name of the hub: with the home directory for a leading ``~``."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_path(text: str) -> Path:
    """Likewise, where it can be nothing but a path."""
    return Path(path_or_name(text))


def load_settings(file: str, overrides: Sequence[str]) -> TrainConfig:
    """The settings of a run that is to read its data.

    Those that another run recorded hold elsewhere too: where their tokenizer is not found, that run's copy stands for
    it, and a line says so.

    Raises:
      ConfigError: as ``config.load``; there is neither the tokenizer nor a copy of it.
    """
    config = load(file, overrides, inherit)
    if Path(file).suffix != ".json" or config.data.tokenizer != read(file).data.tokenizer:
        return config
    with imports():
        from stellarbyte_jax.training import begin
    config, note = begin.with_copy(config, Path(expanded(file)).parent)
    if note is not None:
        print(note)
    return config


def positive(text: str) -> int:
    """An integer of at least 1, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # usual spellings


def also_spelled(spellings: Mapping[str, str]) -> Callable[[str], str]:
    """The type of an argument with choices that may be written in capitals, or in other ways: these -> the choice."""
    return lambda text: spellings.get(text.lower(), text.lower())


def inherit(init_from: str, output_dir: str) -> Mapping[str, Any]:
    """What a config takes over of the directory that its ``init_from`` names; see ``training.begin``."""
    with imports():
        from stellarbyte_jax.launch import quiet_libraries
        from stellarbyte_jax.training import begin
    quiet_libraries()
    return begin.inherit(init_from, output_dir)


@contextlib.contextmanager
def told_by_options(names: Iterable[str]) -> Iterator[None]:
    """Inside it, errors of values speak of the options of a command; ``names`` as for :func:`with_options`."""
    try:
        yield
    except ConfigError:  # of settings, which the command takes by their names
        raise
    except ValueError as error:
        raise ValueError(with_options(str(error), names)) from error


def with_options(message: str, names: Iterable[str]) -> str:
    """What a library says of its arguments, or of settings of a run, as options of a command.

    Args:
      message: of the library.
      names: arguments such as ``cache_dir``, and settings of ``data``, that the command has as ``--cache-dir``. Those
        of one word are replaced only where they stand as ``data.workers``: alone, they may be meant as words.
    """
    names = sorted(names)

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")

    end = r"(?![\w/]|\.\w)(?:=([^\s;,:)]+))?"
    for prefix, known in ((r"data\.", names), ("", [name for name in names if "_" in name])):
        if known:
            message = re.sub(rf"(?<![\w./-]){prefix}({'|'.join(known)}){end}", option, message)
    return message.replace("ask to overwrite it", "add --overwrite")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model is loaded: ``--model``, ``--revision`` and ``--step``."""
    parser.add_argument(
        "--model",
        type=path_or_name,
        required=True,
        metavar="DIR",
        help="a run, RUN/checkpoints/STEP, a Hugging Face directory or one of PEFT, or owner/name of the hub",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model of the hub")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of the run (default: the newest)")

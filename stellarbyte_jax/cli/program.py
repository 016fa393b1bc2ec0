"""Names of the commands, and how to write them for the user who typed one of them."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.parser import Parser
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
    "convert": Command("convert", "convert.py", "checkpoints to and from the Hugging Face format"),
    "report": Command("report", "report.py", "a page with the plots of a run, or of several"),
    "tokenizer": Command("tokenizer", "train_tokenizer.py", "train a tokenizer"),
    "prepare": Command("prepare", "prepare_data.py", "tokenize data once, before training"),
    "info": Command("info", "model_info.py", "tell what a model is and costs"),
    "benchmark": Command("benchmark", "benchmark.py", "measure speed on this machine"),
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


def inherit(init_from: str, output_dir: str) -> Mapping[str, Any]:
    """What a config takes over of the directory that its ``init_from`` names; see ``training.begin``."""
    with imports():
        from stellarbyte_jax.launch import quiet_libraries
        from stellarbyte_jax.training import begin
    quiet_libraries()
    return begin.inherit(init_from, output_dir)

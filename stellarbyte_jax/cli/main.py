"""The console command ``stellarbyte``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from stellarbyte_jax import __version__
from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.cli.program import COMMANDS
from stellarbyte_jax.command import command, imports


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that is named first, with the arguments after it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {each.summary}" for name, each in COMMANDS.items())
    parser = Parser(
        prog="stellarbyte",
        usage="stellarbyte COMMAND ...",
        description="Pretrain, convert and run language models in JAX and Flax.",
        epilog=f"commands (each has --help):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stellarbyte_jax {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of those below")
    chosen = COMMANDS[parser.parse_args(words[:1]).command]
    with imports():
        module = importlib.import_module(f"stellarbyte_jax.cli.{chosen.module}")
    return module.main([*chosen.options, *words[1:]])

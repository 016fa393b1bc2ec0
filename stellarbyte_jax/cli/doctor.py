"""Looks at this machine: what would keep a run from working here, or make it slow."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.cli.program import inherit, new_parser, positive
from stellarbyte_jax.command import MendableError, command, imports, spelled
from stellarbyte_jax.config import TrainConfig, load

if TYPE_CHECKING:
    from stellarbyte_jax.launch.doctor import Finding

_DEFAULT = "quickstart"
_STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, looks at everything, and prints a line for each finding; 1 where there is a fault."""
    options = _parse(arguments)
    config = load(options.config, options.set, inherit)
    with imports():
        from stellarbyte_jax.launch import quiet_libraries
        from stellarbyte_jax.launch.doctor import Peers, examine
    peers = None
    if options.coordinator is not None:
        peers = Peers.parse(options.coordinator, options.processes, options.process, options.wait)
    elif options.processes is not None or options.process is not None:
        raise MendableError("--processes and --process need --coordinator HOST:PORT: give it too")
    quiet_libraries()
    findings = list(examine(config, peers, lambda text: print(f"... {text}", file=sys.stderr, flush=True)))
    code = int(any(each.level == "fault" for each in findings))
    if options.json:
        print(json.dumps({"ok": not code, "findings": [_plain(each) for each in findings]}, indent=1))
    else:
        _print(findings)
    if any(each.facts.get("hung") for each in findings):
        sys.stdout.flush()
        os._exit(code)  # JAX would wait for the devices when Python ends
    return code


def launch(arguments: Sequence[str] | None = None) -> int:
    """``python -m stellarbyte_jax.launch doctor``, which is the same."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="python -m stellarbyte_jax.launch", usage="python -m stellarbyte_jax.launch doctor ...")
    parser.add_argument("command", choices=["doctor"], help="look at this machine; doctor --help tells more")
    parser.parse_args(words[:1])
    return main(words[1:])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "doctor",
        "Look at this machine before a run: versions, driver, GPUs, directories, limits, other machines; and measure "
        "collectives over the mesh and matrix products on each device. A fault keeps a run from working, and the "
        "status is 1; a warning makes it slow, or may do harm.",
        "",
        "--config pretrain --set mesh.fsdp=4 mesh.tensor=2",
        "--json > doctor.json",
        "--coordinator node0:7777 --processes 2 --process 0",
        settings=TrainConfig,
    )
    environment: Mapping[str, str] = os.environ
    parser.add_argument(
        "--config", default=_DEFAULT, metavar="FILE", help="of the run that is to be (default: %(default)s)"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.name=value")
    parser.add_argument("--json", action="store_true", help="print JSON, with what was measured")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        default=environment.get("STELLARBYTE_COORDINATOR") or None,
        help="address of process 0, which is to be reached (default: STELLARBYTE_COORDINATOR)",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        default=environment.get("STELLARBYTE_PROCESSES") or None,
        help="of the run; each runs the doctor, and clocks are compared (default: STELLARBYTE_PROCESSES)",
    )
    parser.add_argument(
        "--process",
        type=_index,
        metavar="I",
        default=environment.get("STELLARBYTE_PROCESS") or None,
        help="this one, from 0 (default: STELLARBYTE_PROCESS)",
    )
    parser.add_argument(
        "--wait", type=positive, default=60, metavar="SECONDS", help="for the others (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 0")
    return int(text)


def _plain(finding: "Finding") -> dict[str, object]:
    return {
        "level": finding.level,
        "check": finding.check,
        "what": finding.what,
        "mend": finding.mend,
        "facts": dict(finding.facts),
    }


def _print(findings: Sequence["Finding"]) -> None:
    with imports():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for each in findings:
        line = Text(spelled(each.line()))
        table.add_row(Text(each.level, style=_STYLES[each.level]), Text(each.check), line)
    console = Console()
    if not console.is_terminal:  # one line each, for grep
        console = Console(width=max(len(each.line()) for each in findings) + 40)
    console.print(table)
    counted = {level: sum(each.level == level for each in findings) for level in _STYLES}
    several = {level: "" if count == 1 else "s" for level, count in counted.items()}
    print(
        f"{counted['fault']} fault{several['fault']}, {counted['warning']} warning{several['warning']}, "
        f"{counted['ok']} ok"
    )

"""A script that calls ``train``: data workers are processes, which run it anew unless that call is guarded."""

import ast
import itertools
import multiprocessing
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data.patterns import expand_all
from stellarbyte_jax.data.sources import SHARD_META

_ADVICE = 'Put what the script does under `if __name__ == "__main__":`, or set data.workers=0'


def refuse_worker() -> None:
    """Raises MendableError in a process that Python has started for a worker, and that is running the script anew."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what Python itself goes by
        file = getattr(sys.modules.get("__mp_main__"), "__file__", None)  # its name there
        raise MendableError(f"{file or 'the script'} begins the training in its data workers too. {_ADVICE}")


def check_guarded(data: DataConfig) -> None:
    """Raises MendableError where workers are needed, and each would train instead: ``train`` is not guarded.

    It is taken for guarded where a condition outside of all functions decides whether it is called: ``if``, ``match``,
    ``and`` or ``or``; not where the script ends before it, which would end a worker too. A script that is read from
    standard input has no file that workers could run.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if data.workers == 0 or file is None:  # an interactive session, a notebook
        return
    is_file = Path(file).is_file()
    if not is_file and not file.startswith("<"):  # within an archive, whose main program no worker runs
        return
    at = _place(main, sys._getframe())
    if at is None or (is_file and _is_conditional(Path(file), at)):
        return
    if all((path / SHARD_META).is_file() for path in expand_all(data.train, "data.train")):
        return  # prepared data needs no worker
    if not is_file:
        raise MendableError(
            f"the script comes from {file}, and each of data.workers={data.workers} would look for it as a file: save "
            "it in one, or set data.workers=0"
        )
    raise MendableError(
        f"{file}, line {at[0]}: with data.workers={data.workers}, each worker would run this. {_ADVICE}"
    )


_Place = tuple[int, int | None]


def _place(main: ModuleType, frame: FrameType | None) -> _Place | None:
    """Line and column, in bytes, of the script that is being run; None where it is not what called.

    There is no column where Python was told to keep none.
    """
    while frame is not None:
        if frame.f_globals is main.__dict__ and frame.f_code.co_name == "<module>":
            instruction = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
            return frame.f_lineno, instruction[2]
        frame = frame.f_back
    return None


def _is_conditional(file: Path, at: _Place) -> bool:
    """Whether a condition, outside of all functions, decides whether this place is reached."""
    try:
        nodes = ast.walk(ast.parse(file.read_bytes()))
    except (OSError, SyntaxError, ValueError):  # no script of Python's, such as an archive
        return True
    return any(_holds(part, at) for node in nodes for part in _decided(node))


def _decided(node: ast.AST) -> list[ast.AST]:
    """What is run or not, as a condition in this node says."""
    match node:
        case ast.If():
            return [*node.body, *node.orelse]
        case ast.Match():
            return [part for case in node.cases for part in case.body]
        case ast.IfExp():
            return [node.body, node.orelse]
        case ast.BoolOp():
            return list(node.values[1:])
    return []


def _holds(node: Any, at: _Place) -> bool:
    line, column = at
    if column is None:
        return node.lineno <= line <= node.end_lineno
    return (node.lineno, node.col_offset) <= (line, column) < (node.end_lineno, node.end_col_offset)

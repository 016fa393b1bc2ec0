"""A script that calls ``train``: data workers are processes, which run it anew unless that call is guarded."""

import ast
import multiprocessing
import sys
from pathlib import Path
from types import FrameType, ModuleType

from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data.sources import SHARD_META, expand_all

_ADVICE = 'Put what the script does under `if __name__ == "__main__":`, or set data.workers=0'


def refuse_worker() -> None:
    """Raises MendableError in a process that Python has started for a worker, and that is running the script anew."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what Python itself goes by
        file = getattr(sys.modules.get("__mp_main__"), "__file__", None)  # its name there
        raise MendableError(f"{file or 'the script'} begins the training in its data workers too. {_ADVICE}")


def check_guarded(data: DataConfig) -> None:
    """Raises MendableError where workers are needed, and each would train instead: ``train`` is not guarded.

    It is taken for guarded inside of any ``if`` at the top level of the script.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if data.workers == 0 or file is None or not Path(file).is_file():  # none: an interactive session, a notebook
        return
    line = _line(main, sys._getframe())
    if line is None or _is_conditional(Path(file), line):
        return
    if all((path / SHARD_META).is_file() for path in expand_all(data.train, "data.train")):
        return  # prepared data needs no worker
    raise MendableError(f"{file}, line {line}: with data.workers={data.workers}, each worker would run this. {_ADVICE}")


def _line(main: ModuleType, frame: FrameType | None) -> int | None:
    """The line of the script that is being run; None where it is not what called."""
    while frame is not None:
        if frame.f_globals is main.__dict__ and frame.f_code.co_name == "<module>":
            return frame.f_lineno
        frame = frame.f_back
    return None


def _is_conditional(file: Path, line: int) -> bool:
    """Whether a line stands inside of an ``if``, outside of all functions."""
    try:
        nodes = ast.walk(ast.parse(file.read_bytes()))
    except (OSError, SyntaxError, ValueError):  # no script of Python's, such as an archive
        return True
    return any(isinstance(node, ast.If) and node.lineno <= line <= (node.end_lineno or line) for node in nodes)

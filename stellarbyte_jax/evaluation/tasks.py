"""Tasks of lm-eval, by name or from files of one's own, and the metrics of a model on them."""

import contextlib
import functools
import io
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stellarbyte_jax.command import MendableError, one_line
from stellarbyte_jax.config.foreign import absent, json_object
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.evaluation.adapter import require_lm_eval

_FILES = (".yaml", ".yml", ".json")
# Of medians, F1 and perplexities. lm-eval's own command draws 100,000 times, in processes that a fork of JAX cannot be.
_BOOTSTRAP_DRAWS = 1000
_NO_BOOTSTRAP_PROCESSES = "DISABLE_MULTIPROC"


@dataclass(frozen=True)
class Result:
    """One metric of one task or group of tasks.

    Attributes:
      task: its name.
      metric: such as ``acc``; with the name of the filter behind a slash where answers were filtered.
      value: a number, or what the task gives instead.
      stderr: standard error; None where it has none.
      samples: documents that count; None for groups.
    """

    task: str
    metric: str
    value: Any
    stderr: float | None
    samples: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def check_tasks(names: Sequence[str]) -> None:
    """Loads tasks with their data, as :func:`evaluate_tasks` will.

    Raises:
      ImportError: lm-eval is not installed.
      MendableError: a task does not exist, or cannot be loaded.
    """
    require_lm_eval()
    with quiet():
        _loaded(tuple(names))


def evaluate_tasks(
    lm: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
) -> list[Result]:
    """Metrics of a model on tasks.

    Random numbers of Python, numpy and torch are those of before when it returns.

    Args:
      lm: see :func:`adapter.as_lm`.
      names: of tasks, groups or tags that lm-eval knows, or paths of YAML or JSON files, each with one task.
      limit: documents of each task, the first ones; None: all.
      num_fewshot: examples before each question; None: as the task says.
      chat: whether prompts go through the model's chat template.

    Raises:
      ImportError: lm-eval is not installed.
      MendableError: a task does not exist, cannot be loaded or cannot be evaluated.
      ValueError: a request cannot be answered by this model.
    """
    require_lm_eval()
    import lm_eval  # pyright: ignore[reportMissingImports]

    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorators hide what it takes
    with quiet():
        manager, tasks = _loaded(tuple(names))
        try:
            found = simple_evaluate(
                model=lm,
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_DRAWS,
            )
        except (KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:  # of a task's own code
            raise MendableError(
                f"{', '.join(names)}: the tasks cannot be evaluated ({type(error).__name__}: {one_line(str(error))}): "
                "look into their files, or try them one by one"
            ) from error
        except ValueError as error:
            words = one_line(str(error))
            if words.startswith("Sample larger than population"):  # Python's, of drawing examples
                words = f"they have fewer examples than the {num_fewshot or 'number'} asked for: lower num_fewshot"
            raise ValueError(f"{', '.join(names)}: {words}") from error
        finally:
            if num_fewshot is not None:  # lm-eval has written it into the tasks
                _loaded.cache_clear()
    return list(_results(found))


def is_file(name: str) -> bool:
    """Whether the name of a task is that of a file."""
    return name.endswith(_FILES)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside it lm-eval prints nothing, starts no processes, and changes no random numbers for others."""
    import datasets  # pyright: ignore[reportMissingImports]

    python, numbers = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_numbers = None if torch is None else torch.get_rng_state()
    before = os.environ.get(_NO_BOOTSTRAP_PROCESSES)
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    bars = datasets.utils.are_progress_bars_disabled()
    os.environ[_NO_BOOTSTRAP_PROCESSES] = "1"
    datasets.disable_progress_bars()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        if before is None:
            del os.environ[_NO_BOOTSTRAP_PROCESSES]
        else:
            os.environ[_NO_BOOTSTRAP_PROCESSES] = before
        random.setstate(python)
        np.random.set_state(numbers)
        if torch is not None:
            torch.set_rng_state(torch_numbers)


@functools.lru_cache(maxsize=4)
def _loaded(names: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """lm-eval's manager, and tasks and groups with their data."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_defaults=not all(map(is_file, names)))
    tasks: dict[str, str] = {}
    built = []
    for name in names:
        if not is_file(name):
            _check_name(manager, name)
        try:
            loaded = manager.load([_definition(name)])
        except MendableError:
            raise
        except Exception as error:  # of a task's own code, of datasets, of YAML
            raise MendableError(
                f"{name}: the task cannot be loaded ({type(error).__name__}: {one_line(str(error))}): mend its file, "
                "or make its data available"
            ) from error
        for task in loaded["tasks"]:
            if task in tasks:
                raise MendableError(f"{task} is a task of {tasks[task]} and of {name}: name it once")
            tasks[task] = name
        inner = {child for children in loaded.get("group_map", {}).values() for child in children}
        members = {**loaded["tasks"], **loaded.get("groups", {})}
        built += [member for member_name, member in members.items() if member_name not in inner]
    return manager, built


def _definition(name: str) -> Any:
    """What lm-eval loads: a name, the path of a YAML file, or the content of a JSON file."""
    if not is_file(name):
        return name
    path = Path(expanded(name))
    if not path.is_file():
        raise MendableError(f"{absent(name)}: give the path of a task, or a name that lm-eval knows")
    if path.suffix != ".json":
        return str(path)
    try:
        values = json_object(path.read_bytes(), str(path))
    except ValueError as error:
        raise MendableError(str(error)) from error
    if "include" not in values:
        return values
    from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]

    return load_yaml(path)  # JSON is YAML too, and this follows includes


def _check_name(manager: Any, name: str) -> None:
    if name in manager.all_tasks:
        return
    import difflib

    close = difflib.get_close_matches(name, manager.all_tasks, n=3)
    meant = f"did you mean {' or '.join(close)}?" if close else "give the name of a task, or the path of a YAML file"
    raise MendableError(f"{name}: lm-eval knows no task of this name; {meant}")


def _results(found: Any) -> Iterator[Result]:
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{name}_stderr,{kind}")
            yield Result(
                task,
                name if kind == "none" else f"{name}/{kind}",
                _plain(value),
                float(stderr) if isinstance(stderr, int | float) else None,
                found.get("n-samples", {}).get(task, {}).get("effective"),
            )


def to_json(results: Sequence[Result], about: dict[str, Any]) -> str:
    """The results, and what they are of, as a JSON text; null stands for what JSON has no number for."""
    values = _finite({**about, "results": [result.to_dict() for result in results]})
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """What a task's own metric gave, as numbers, texts, lists and objects by names."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Config files: Python files with ``def config() -> TrainConfig``, and ``section.name=value`` overrides.

A config file may import its neighbours: ``from .pretrain import config as pretrain``.
"""

import contextlib
import difflib
import importlib
import importlib.util
import json
import os
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stellarbyte_jax.config.foreign import clipped, shown
from stellarbyte_jax.config.run import TrainConfig
from stellarbyte_jax.config.section import ConfigError, Section, fits, hints, is_section, require, spell, unknown_name

AnySection = TypeVar("AnySection", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Runs a config file's ``config()`` and applies ``section.name=value`` overrides.

    ``path`` may be the name of a file that comes with the package, such as ``quickstart``. The file is read anew at
    each call, and so is what it imports from its folder.

    Values are read as the field's type; lists as JSON or comma-separated words; ``none`` is None.

    Raises:
      ConfigError: the file is missing or fails, or an override names no setting or has the wrong type.
    """
    path = _find(Path(path))
    try:
        made = _run(path)
        require(isinstance(made, TrainConfig), f"config() must return a TrainConfig, got {type(made).__name__}")
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{path}{f', line {lines[-1]}' if lines else ''}: {kind}{error}") from error
    return override(made, overrides)


def shipped(folder: str) -> Path:
    """A folder that comes with the package, ``configs``, ``data`` or ``tokenizer``: in a clone the one at its root."""
    package = Path(__file__).parents[1]
    installed = package / "shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def _find(path: Path) -> Path:
    """The config file that a path means, or the name of one that comes with the package."""
    named = shipped("configs") / f"{path.name}.py"
    if not path.is_file() and path.parent == Path() and not path.suffix and named.is_file():
        return named
    if not path.is_file():
        nearby = sorted(path.parent.glob("*.py")) if path.parent.is_dir() else []
        known = {each.name: str(each) for each in nearby} | {
            each.stem: each.stem for each in shipped("configs").glob("*.py")
        }
        guess = difflib.get_close_matches(path.name, known, n=1)
        hint = f"; did you mean {known[guess[0]]}?" if guess else ""
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(f"config file {path} does not exist{place}{hint}")
    require(path.suffix == ".py", f"config file {path} must be a Python file, ending in .py")
    return path


def beside(file: str, relative: str) -> str:
    """A path named from a config file's folder, as it is from the working directory.

    ``beside(__file__, "../data/x.jsonl")`` finds the file wherever the command is typed.
    """
    return os.path.relpath(Path(file).resolve().parent / relative)


_FOLDER = "_config_files"  # the package that a config file's folder is for the time of loading


def _run(path: Path) -> Any:
    """What the file's ``config()`` returns."""
    folder = types.ModuleType(_FOLDER)
    folder.__path__ = [str(path.resolve().parent)]
    sys.modules[_FOLDER] = folder
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location(f"{_FOLDER}._main", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        require(callable(getattr(module, "config", None)), "must define `def config() -> TrainConfig`")
        return module.config()
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == _FOLDER]:
            del sys.modules[name]


def override(config: AnySection, overrides: Sequence[str]) -> AnySection:
    """Returns a config, or one of its sections, with ``section.name=value`` strings applied together, checked once.

    Raises:
      ConfigError: as :func:`load`.
    """
    values = config.to_dict()
    settings = _settings(type(config))
    for text in overrides:
        name, equals, raw = (part.strip() for part in text.partition("="))
        require(bool(equals), f"setting {shown(text)}: expected section.name=value")
        require(name in settings, unknown_name(name, settings, f"setting {shown(text)}"))
        readings = [value for value in _readings(raw) if fits(value, settings[name])]
        require(len(readings) > 0, f"setting {name}={clipped(raw)}: {name} must be {spell(settings[name])}")
        *sections, leaf = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[leaf] = readings[0]
    return type(config).from_dict(values)


def _settings(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of every setting under its dotted name."""
    settings = {}
    for name, hint in hints(cls).items():
        settings |= _settings(hint, f"{prefix}{name}.") if is_section(hint) else {prefix + name: hint}
    return settings


def _readings(raw: str) -> Iterator[Any]:
    """What the text of an override can mean, the most specific first."""
    constants = {"none": None, "null": None, "true": True, "false": False}
    if raw.lower() in constants:
        yield constants[raw.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            yield number(raw)
    with contextlib.suppress(ValueError, RecursionError):  # RecursionError: of brackets in brackets
        parsed = json.loads(raw)
        if isinstance(parsed, list):
            yield tuple(parsed)
    yield raw
    yield tuple(word.strip() for word in raw.split(",") if word.strip())

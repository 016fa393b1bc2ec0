"""Config files, and ``section.name=value`` overrides.

A config file is a Python file with ``def config() -> TrainConfig``, or the ``train_config.json`` of a run. A Python
file may import its neighbours: ``from .pretrain import config as pretrain``.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from stellarbyte_jax.config.data import DataConfig
from stellarbyte_jax.config.foreign import absent, clipped, json_object, shown
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.config.run import TrainConfig
from stellarbyte_jax.config.section import ConfigError, Section, fits, hints, is_section, require, spell, unknown_name

AnySection = TypeVar("AnySection", bound=Section)


_SUFFIXES = (".py", ".json")
# (init_from, output_dir) -> what a run takes over: settings and whole sections by their dotted names.
Inherit = Callable[[str, str], Mapping[str, Any]]


def load(path: str | Path, overrides: Sequence[str] = (), inherit: Inherit | None = None) -> TrainConfig:
    """Reads a config file and applies ``section.name=value`` overrides.

    A Python file is run anew at each call, and so is what it imports from its folder.

    Values are read as the field's type; lists as JSON or comma-separated words; ``none`` is None.

    Args:
      path: a Python file with ``def config() -> TrainConfig``, a JSON file such as ``RUN/train_config.json``, or the
        name of a file that comes with the package, such as ``quickstart``.
      overrides: settings that go before the file's.
      inherit: see :func:`compose`.

    Raises:
      ConfigError: the file is missing or fails, or an override names no setting or has the wrong type.
    """
    return compose(read(path), overrides, inherit)


def compose(config: TrainConfig, overrides: Sequence[str] = (), inherit: Inherit | None = None) -> TrainConfig:
    """Applies overrides to a config, and to what it takes over from the directory that ``init_from`` names.

    An override of ``init_from`` replaces the config's model and tokenizer, which go with the weights that the config
    was made for; adapters, which go with any, stay. An ``init_from`` of the config itself gives the model and the
    tokenizer that the config leaves out.

    Args:
      config: to change.
      overrides: ``section.name=value`` strings.
      inherit: what a run takes over; not called without ``init_from``. None: nothing.

    Raises:
      ConfigError: as :func:`load`.
    """
    given = parsed(TrainConfig, overrides)
    source = given.get("init_from", config.init_from)
    if source is None or inherit is None:
        return override(config, overrides)
    replaces = "init_from" in given
    base = dict(inherit(*map(_home, (source, given.get("output_dir", config.output_dir)))))
    base["model"] = {**base["model"], "lora": config.model.lora.to_dict()}
    if not (replaces or config.leaves_model_out):
        del base["model"]
    if not (replaces or config.data.tokenizer == DataConfig().tokenizer):
        base = {name: value for name, value in base.items() if not name.startswith("data.")}
    composed = override(config, overrides, base)
    composed.check_model()
    return composed


def read(path: str | Path) -> TrainConfig:
    """The settings of a config file.

    Raises:
      ConfigError: it is missing or fails, or holds no settings of a run.
    """
    path = _find(Path(_home(path)))
    if path.suffix == ".json":
        return _from_json(path)
    try:
        made = _run(path)
        require(isinstance(made, TrainConfig), f"config() must return a TrainConfig, got {type(made).__name__}")
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}{_failure(error, path)}") from error
    return made


def _failure(error: BaseException, path: Path) -> str:
    """Where a config file failed, and of what."""
    file = path.resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file]
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, ConfigError):
        what = str(error)
    elif isinstance(error, SystemExit):
        what = f"it ends the program (SystemExit: {error}); leave that out"
    elif isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == file:
        what, lines = f"SyntaxError: {error.msg}", [error.lineno]
    return f"{f', line {lines[-1]}' if lines else ''}: {what}"


def _from_json(path: Path) -> TrainConfig:
    try:
        return TrainConfig.from_dict(json_object(path.read_bytes(), str(path)))
    except ConfigError as error:
        raise ConfigError(f"{path} holds no settings of a run, as train_config.json does: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def shipped(folder: str) -> Path:
    """A folder that comes with the package, ``configs``, ``data`` or ``tokenizer``: in a clone the one at its root."""
    package = Path(__file__).parents[1]
    installed = package / "shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def _home(path: str | Path) -> str:
    try:
        return expanded(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _find(path: Path) -> Path:
    """The config file that a path means, or the name of one that comes with the package."""
    named = shipped("configs") / f"{path.name}.py"
    if not path.is_file() and path.parent == Path() and not path.suffix and named.is_file():
        return named
    if path.is_dir():
        settings = path / "train_config.json"
        hint = "name a Python file, or the train_config.json of a run"
        hint = f"the settings of this run are in {settings}" if settings.is_file() else hint
        raise ConfigError(f"config file {path} is a directory; {hint}")
    if not path.is_file():
        nearby = sorted(p for p in path.parent.glob("*.*") if p.suffix in _SUFFIXES) if path.parent.is_dir() else []
        known = {each.name: str(each) for each in nearby} | {
            each.stem: each.stem for each in shipped("configs").glob("*.py")
        }
        guess = difflib.get_close_matches(path.name, known, n=1)
        hint = f"; did you mean {known[guess[0]]}?" if guess else ""
        raise ConfigError(f"config file {absent(path)}{hint}")
    require(
        path.suffix in _SUFFIXES,
        f"config file {path} must be a Python file, ending in .py, or the train_config.json of a run",
    )
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
    sys.modules[spec.name] = module  # dataclasses look there for the names in annotations
    try:
        spec.loader.exec_module(module)
        require(callable(getattr(module, "config", None)), "must define `def config() -> TrainConfig`")
        return module.config()
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == _FOLDER]:
            del sys.modules[name]


def override(
    config: AnySection, overrides: Sequence[str], base: Mapping[str, Any] = MappingProxyType({})
) -> AnySection:
    """Returns a config, or one of its sections, with ``section.name=value`` strings applied together, checked once.

    Args:
      config: what is changed.
      overrides: the strings.
      base: settings, or whole sections as mappings, by their dotted names; they replace the config's first.

    Raises:
      ConfigError: as :func:`load`.
    """
    values = config.to_dict()
    for name, value in (*base.items(), *parsed(type(config), overrides).items()):
        *sections, leaf = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[leaf] = value
    return type(config).from_dict(values)


def parsed(cls: type[Section], overrides: Sequence[str]) -> dict[str, Any]:
    """The values of ``section.name=value`` strings by their dotted names, as settings of ``cls``.

    Raises:
      ConfigError: as :func:`load`.
    """
    settings = setting_types(cls)
    values: dict[str, Any] = {}
    for text in overrides:
        name, equals, raw = (part.strip() for part in text.partition("="))
        require(bool(equals), f"setting {shown(text)}: expected section.name=value")
        require(name in settings, unknown_name(name, settings, f"setting {shown(text)}"))
        readings = [value for value in _readings(raw) if fits(value, settings[name])]
        require(
            len(readings) > 0,
            f"setting {name}={clipped(raw)}: {name} must be {spell(settings[name])}{_as_list(name, raw)}",
        )
        values[name] = readings[0]
    return values


def setting_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of every setting under its dotted name."""
    settings = {}
    for name, hint in hints(cls).items():
        settings |= setting_types(hint, f"{prefix}{name}.") if is_section(hint) else {prefix + name: hint}
    return settings


def _as_list(name: str, raw: str) -> str:
    """How a list is written, for brackets round words, which are no JSON."""
    if not (raw.startswith("[") and raw.endswith("]")):
        return ""
    return f": write {name}=a,b without brackets, or JSON, whose texts stand in double quotes"


def _readings(raw: str) -> Iterator[Any]:
    """What the text of an override can mean, the most specific first."""
    constants = {"none": None, "null": None, "true": True, "false": False}
    if raw.lower() in constants:
        yield constants[raw.lower()]
    if raw.lower() in ("none", "null"):
        yield ()  # of a list
    for number in (int, float):
        with contextlib.suppress(ValueError):
            yield number(raw)
    with contextlib.suppress(ValueError, RecursionError):  # RecursionError: of brackets in brackets
        parsed = json.loads(raw)
        if isinstance(parsed, list):
            yield tuple(parsed)
    yield raw
    if not (raw.startswith("[") and raw.endswith("]")):  # which is meant as JSON, and is none
        yield tuple(word.strip() for word in raw.split(",") if word.strip())

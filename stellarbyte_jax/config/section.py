"""What every settings class can do: check types and rules, turn into plain JSON values and back."""

import dataclasses
import difflib
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.config.paths import expanded

# What other programs call the same.
USUAL = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "max_iters": "steps",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
    "grad_clip": "gradient_clip_norm",
    "max_grad_norm": "gradient_clip_norm",
    "beta1": "b1",
    "beta2": "b2",
    "seq_len": "sequence_length",
    "block_size": "sequence_length",
    "max_seq_length": "sequence_length",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "eval_interval": "interval",
    "save_steps": "interval",
    "dtype": "compute_dtype",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "dropout": "hidden_dropout",
    "gradient_checkpointing": "remat",
    "report_to": "trackers",
}
_FEW = 12  # settings that an error may list


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type or contradicts another one."""


def require(ok: bool, message: str) -> None:
    """Raises ConfigError with ``message`` where ``ok`` is false."""
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class Rule:
    """What a number must satisfy, said in its field's type."""

    words: str
    holds: Callable[[float], bool] = field(repr=False)


# Integers become numbers of arrays, and sizes their dimensions, which are counted in 32 bits.
PositiveInt = Annotated[int, Rule("positive, below 2^63", lambda v: 0 < v < 2**63)]
NonNegativeInt = Annotated[int, Rule("not negative, below 2^63", lambda v: 0 <= v < 2**63)]
Size = Annotated[int, Rule("positive, below 2^31", lambda v: 0 < v < 2**31)]
SizeOrZero = Annotated[int, Rule("not negative, below 2^31", lambda v: 0 <= v < 2**31)]
PositiveFloat = Annotated[float, Rule("positive, finite", lambda v: 0 < v < math.inf)]
NonNegativeFloat = Annotated[float, Rule("not negative, finite", lambda v: 0 <= v < math.inf)]
Fraction = Annotated[float, Rule("in [0, 1)", lambda v: 0 <= v < 1)]
Share = Annotated[float, Rule("in [0, 1]", lambda v: 0 <= v <= 1)]


class Section:
    """What every settings class can do: check types, turn into plain JSON values and back."""

    _aliases: ClassVar[Mapping[str, str]] = {}
    _paths: ClassVar[tuple[str, ...]] = ()  # settings that are paths: a leading ~ is kept as the home directory
    _example: ClassVar[str | None] = None  # a setting that a message may show; None: the first one

    def __new__(cls, *unnamed: Any, **values: Any) -> Self:
        """Raises ConfigError on a value without a name, and on a name that does not exist."""
        if unnamed:
            example = f"{cls.__name__}({cls._example or next(iter(hints(cls)))}={shown(unnamed[0])})"
            raise ConfigError(f"settings of {cls.__name__} are given by name, such as {example}")
        for name in values:
            if name not in hints(cls):
                raise ConfigError(unknown_name(name, hints(cls), cls.__name__))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, Mapping) and is_section(hint):
                value = hint.from_dict(value)
            elif type(value) is int and fits(0.5, hint) and fits(value, hint):
                value = float(value)
            object.__setattr__(self, name, value)
            require(fits(value, hint), f"{type(self).__name__}.{name} must be {spell(hint)}, got {shown(value)}")
        for name in self._paths:
            object.__setattr__(self, name, _expanded(getattr(self, name), f"{type(self).__name__}.{name}"))
        self._check()

    def _check(self) -> None:
        """Raises ConfigError where settings contradict each other."""

    def given(self) -> list[str]:
        """Names of the settings that differ from their defaults."""
        made = {
            f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[misc]
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        }
        return [name for name, default in made.items() if getattr(self, name) != default]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, nested as the classes are."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. Raises ConfigError on a name that does not exist."""
        require(
            isinstance(values, Mapping), f"{cls.__name__} must be an object with named settings, got {shown(values)}"
        )
        known_hints = hints(cls)
        settings: dict[str, Any] = {}
        for name, value in values.items():
            known = cls._aliases.get(name, name)
            require(
                known not in settings, f"{cls.__name__}.{known} is given twice: once as {shown(name)}; give it once"
            )
            settings[known] = known_hints[known].from_dict(value) if is_section(known_hints.get(known)) else value
        missing = [name for name in _required(cls) if name not in settings]
        require(not missing, f"{cls.__name__} lacks {', '.join(missing)}: give it")
        return cls(**settings)


def _expanded(value: Any, where: str) -> Any:
    if value is None:
        return None
    try:
        return tuple(map(expanded, value)) if isinstance(value, tuple) else expanded(value)
    except ValueError as error:
        raise ConfigError(f"{where} {error}") from error


def _required(cls: type[Section]) -> list[str]:
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


@functools.cache  # it evaluates annotations, and every section that is made asks for them
def hints(cls: type) -> Mapping[str, Any]:
    """The type of each setting of a section."""
    return {n: h for n, h in typing.get_type_hints(cls, include_extras=True).items() if not n.startswith("_")}


def is_section(hint: Any) -> bool:
    """Whether a setting's type is a section of its own."""
    return isinstance(hint, type) and issubclass(hint, Section)


def unknown_name(name: str, known: Mapping[str, Any], where: str) -> str:
    """The message for a setting that does not exist, with guesses, and with the list of all where that is short."""
    guess = guesses(name, known)
    hint = f"; did you mean {' or '.join(guess)}?" if guess else ""
    more = ", ".join(known) if len(known) <= _FEW else "stellarbyte train --list-settings lists all"
    return f"{where}: there is no setting {shown(name)}{hint} ({more})"


def guesses(name: str, known: Mapping[str, Any]) -> list[str]:
    """The settings that a name may mean: the same one spelled otherwise, of another section, or of another program."""
    name = name.replace("-", "_")
    same = [k for k in known if k.replace(".", "_") == name.replace(".", "_")]
    if same:
        return same
    leaf = name.rpartition(".")[2]
    found = [k for k in known if k.startswith(f"{name}.") or k.rpartition(".")[2] in (leaf, USUAL.get(leaf))]
    return found or difflib.get_close_matches(name, known, n=2, cutoff=0.6)


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` has a type of ``hint`` and keeps its rule; an int is also a float, a bool is neither."""
    for option in options(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Annotated:
            fitting = fits(value, arguments[0]) and arguments[1].holds(value)
        elif origin is Literal:
            fitting = value in arguments
        elif origin is tuple:
            fitting = isinstance(value, tuple) and all(fits(v, arguments[0]) for v in value)
        elif option in (int, float):
            fitting = isinstance(value, int | option) and not isinstance(value, bool)
            if option is float and isinstance(value, int):  # one may be above every float
                fitting = fitting and abs(value) <= sys.float_info.max
        else:
            fitting = isinstance(value, option)
        if fitting:
            return True
    return False


def spell(hint: Any) -> str:
    """A type in words."""
    words = []
    for option in options(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Annotated:
            words.append(f"{spell(arguments[0])} ({arguments[1].words})")
        elif origin is Literal:
            words.append("one of " + ", ".join(map(str, arguments)))
        elif origin is tuple:
            words.append(f"a list of {spell(arguments[0])}")
        else:
            words.append("none" if option is type(None) else option.__name__)
    return " or ".join(words)


def written(value: Any) -> str:
    """A value as ``--set`` reads it."""
    if isinstance(value, tuple | list):
        return json.dumps(value, ensure_ascii=False)
    words: Mapping[Any, str] = {None: "none", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)

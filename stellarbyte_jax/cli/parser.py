"""The parser of command lines: its errors are one line, which knows its options and the settings of ``--set``."""

import argparse
import difflib
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from stellarbyte_jax.command import print_error
from stellarbyte_jax.config.files import setting_types
from stellarbyte_jax.config.section import Section, guesses

_CLOSE = 0.6  # of a name that may be mistyped, as in ``section.guesses``


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which knows the settings that ``--set`` takes.

    Options are written out: a beginning that is unambiguous today may be another option tomorrow.
    """

    def __init__(self, *, settings: type[Section] | None = None, **options: Any) -> None:
        """As its parent; ``settings`` are those of ``--set``."""
        super().__init__(allow_abbrev=False, **options)
        self._settings = {} if settings is None else setting_types(settings)
        self._typed: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong with the command line, without how it is used, and ends the program."""
        print_error(ValueError(message + self._hint(message)), f" (see {self.prog} --help)")
        self.exit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As its parent."""
        self._typed = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As its parent; what is not recognized may be a setting."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return parsed

    def _hint(self, message: str) -> str:
        """What an error of the parent adds from what was typed; nothing where that does not explain it."""
        known = self._options()
        if message.startswith("the following arguments are required: "):
            for number, word in enumerate(self._typed):
                if word.startswith("-") and word.partition("=")[0] not in known:
                    return self._meant(self._typed[number:])
        lacking = re.match(r"argument (?:\S+/)?(--?\S+): expected (?:one|at least one) argument$", message)
        for option, value in itertools.pairwise(self._typed if lacking else ()):
            if lacking and option == lacking[1] and value.startswith("-") and value.partition("=")[0] not in known:
                meant = self._meant([value]) if value.startswith("--") else ""
                return meant or f"; a value that begins with a dash is written {shlex.quote(f'{option}={value}')}"
        return ""

    def _options(self) -> list[str]:
        """The options, those of sub-commands too."""
        within = [action.choices.values() for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        parsers = [self, *itertools.chain.from_iterable(within)]
        return [option for parser in parsers for option in parser._option_string_actions]

    def _meant(self, unknown: Sequence[str]) -> str:
        """How the first of these arguments is given, as an option or a setting; nothing where there is no such one."""
        name, equals, value = unknown[0].lstrip("-").partition("=")
        is_option = unknown[0].startswith("-")
        if not equals and not is_option:
            return ""
        following = itertools.takewhile(lambda word: not word.startswith("--"), unknown[1:])
        values = [value] if equals else list(following)
        settings = guesses(name, self._settings)
        if is_option and (option := self._own(name, settings)):
            return f"; did you mean {shlex.join([option, *values])}?"
        meant = []
        for guess in settings:
            default = ["true"] if self._settings[guess] is bool else ["VALUE"]
            meant.append("--set " + shlex.quote(f"{guess}={','.join(values or default)}"))
        return f"; did you mean {' or '.join(meant)}?" if meant else ""

    def _own(self, name: str, settings: Sequence[str]) -> str | None:
        """The option that a name means, spelled otherwise, cut off or mistyped; None where a setting is nearer."""
        options = {_plain(option): option for option in self._options()}
        name = _plain(name)
        begun = [option for option in options if option.startswith(name)]
        if name in options or (len(begun) == 1 and not settings):
            return options[begun[0] if name not in options else name]
        close = difflib.get_close_matches(name, options, n=1, cutoff=_CLOSE)
        like = [_likeness(name, part) for each in settings for part in (each, each.rpartition(".")[2])]
        return options[close[0]] if close and _likeness(name, close[0]) >= max(like, default=0) else None


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, _plain(other), name).ratio()

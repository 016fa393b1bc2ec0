"""The parser of command lines: its errors are one line, which knows the settings that ``--set`` takes."""

import argparse
import itertools
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from stellarbyte_jax.command import print_error
from stellarbyte_jax.config.files import setting_types
from stellarbyte_jax.config.section import Section, guesses


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which knows the settings that ``--set`` takes."""

    def __init__(self, *, settings: type[Section] | None = None, **options: Any) -> None:
        """As its parent; ``settings`` are those of ``--set``."""
        super().__init__(**options)
        self._settings = {} if settings is None else setting_types(settings)

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong with the command line, without how it is used, and ends the program."""
        print_error(ValueError(message), f" (see {self.prog} --help)")
        self.exit(2)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As its parent; what is not recognized may be a setting."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return parsed

    def _meant(self, unknown: Sequence[str]) -> str:
        """How the first of these arguments is given as a setting; nothing where there is no such one."""
        name, equals, value = unknown[0].lstrip("-").partition("=")
        if not equals and not unknown[0].startswith("-"):
            return ""
        following = itertools.takewhile(lambda word: not word.startswith("--"), unknown[1:])
        values = [value] if equals else list(following)
        meant = []
        for guess in guesses(name, self._settings):
            default = ["true"] if self._settings[guess] is bool else ["VALUE"]
            meant.append("--set " + shlex.quote(f"{guess}={','.join(values or default)}"))
        return f"; did you mean {' or '.join(meant)}?" if meant else ""

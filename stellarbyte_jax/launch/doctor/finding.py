"""What one check found."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stellarbyte_jax.command import one_line

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
      level: a fault keeps a run from working; a warning makes it slow, or may do harm later.
      check: what was looked at.
      what: was found.
      mend: what to do about it.
      facts: the same as numbers and names, for programs.
    """

    level: Level
    check: str
    what: str
    mend: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """What was found, with what to do about it."""
        return one_line(f"{self.what} (mend: {self.mend})" if self.mend else self.what)


Check = Callable[[], Iterable[Finding]]


def guarded(name: str, check: Check) -> Iterator[Finding]:
    """What a check finds; an error of the system or of a library in it is a fault with its message.

    Args:
      name: of the check.
      check: to run.
    """
    try:
        yield from check()
    except (OSError, RuntimeError, ValueError) as error:
        yield Finding("fault", name, f"could not be looked at: {error}", "see what the message names, then start again")

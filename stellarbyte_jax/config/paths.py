"""Paths as users give them: in settings, options and calls."""

import os
from pathlib import Path


def expanded(path: str | Path) -> str:
    """A path with the home directory for a leading ``~`` or ``~user``, which the shell leaves in ``--set a=~/b``.

    Raises:
      ValueError: that home directory is not known.
    """
    given = str(path)
    made = os.path.expanduser(given)
    if made.startswith("~"):
        user = given.partition("/")[0]
        raise ValueError(
            f"{given}: there is no home directory of {user}: write the whole path, or ./{given} for a folder there"
        )
    return made


def home() -> Path | None:
    """The home directory; None where there is none, as for a user of a container who has a number alone."""
    made = os.path.expanduser("~")
    return Path(made) if os.path.isabs(made) else None


def real(path: str | Path) -> Path:
    """The absolute path without links, as far as they lead anywhere.

    ``Path.resolve`` raises a RuntimeError, up to Python 3.12, where a link leads to itself.
    """
    return Path(os.path.realpath(path))

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

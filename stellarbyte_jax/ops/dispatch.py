"""Picks one of several implementations of an operation by name.

An implementation refuses arguments that it does not support with ``NotImplementedError`` and a reason.
``"auto"`` takes the first that does not refuse and logs the choice once; one chosen by name fails loudly.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_logged: set[tuple[str, str, str]] = set()


def dispatch(
    operation: str,
    name: str,
    implementations: Mapping[str, Callable[..., Result]],
    *args: object,
    required: bool = True,
    **kwargs: object,
) -> Result:
    """Calls the implementation ``name``, or for ``"auto"`` the first in the mapping's order that does not refuse.

    Args:
      operation: for messages.
      name: of an implementation, or ``"auto"``.
      implementations: by name.
      *args: of the implementation.
      required: False: what the implementation named refuses goes on as with ``"auto"``, and that is logged.
      **kwargs: of the implementation.

    Raises:
      ValueError: no implementation has this name.
      NotImplementedError: the chosen implementation refuses the arguments, or for ``"auto"`` all do.
    """
    if name != "auto" and name not in implementations:
        raise ValueError(f"{operation}: no implementation {name!r}; there are auto, {', '.join(implementations)}")
    if name != "auto" and required:
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as refusal:
            raise NotImplementedError(f"{operation}: {name} refused: {refusal}") from None
    named = [] if name == "auto" else [name]
    refusals: list[str] = []
    for candidate in [*named, *(n for n in implementations if n not in named)]:
        try:
            result = implementations[candidate](*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{candidate} refused: {refusal}")
            continue
        if (operation, name, candidate) not in _logged:
            _logged.add((operation, name, candidate))
            _log.info("%s: using %s%s", operation, candidate, f" ({'; '.join(refusals)})" if refusals else "")
        return result
    raise NotImplementedError(f"{operation}: {'; '.join(refusals)}")

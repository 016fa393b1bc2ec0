"""Picks one of several implementations of an operation by name.

An implementation refuses arguments that it does not support with ``NotImplementedError`` and a reason.
``"auto"`` takes the first that does not refuse and logs the choice once; one chosen by name fails loudly.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

_log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


def dispatch(operation: str, name: str, implementations: Mapping[str, Callable[..., Any]], *args: Any, **kwargs: Any):
    """Calls the implementation ``name``, or for ``"auto"`` the first in the mapping's order that does not refuse.

    Raises:
      ValueError: no implementation has this name.
      NotImplementedError: the chosen implementation refuses the arguments, or for ``"auto"`` all do.
    """
    if name != "auto":
        if name not in implementations:
            raise ValueError(f"{operation}: no implementation {name!r}; there are auto, {', '.join(implementations)}")
        return implementations[name](*args, **kwargs)
    refusals: list[str] = []
    for candidate, implementation in implementations.items():
        try:
            result = implementation(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{candidate} refused: {refusal}")
            continue
        if (operation, candidate) not in _logged:
            _logged.add((operation, candidate))
            _log.info("%s: using %s%s", operation, candidate, f" ({'; '.join(refusals)})" if refusals else "")
        return result
    raise NotImplementedError(f"{operation}: {'; '.join(refusals)}")

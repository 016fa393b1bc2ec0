"""The checker of annotations on arrays: beartype, with two exceptions that jax and methods need."""

from collections.abc import Callable
from typing import Any, Self, get_args, get_origin

from beartype import beartype


def check(function: Callable) -> Callable:
    """Checks arguments and results of a function.

    Constructors stay as they are: ``jax.tree.map`` builds pytrees anew with leaves of any kind. ``Self`` means
    anything, because beartype knows it only in classes that it decorates as a whole.
    """
    if function.__name__ == "__init__":
        return function
    function.__annotations__ = {name: _without_self(hint) for name, hint in function.__annotations__.items()}
    return beartype(function)


def _without_self(hint: Any) -> Any:
    if hint is Self:
        return object
    if get_origin(hint) is tuple and Self in get_args(hint):
        return tuple[tuple(_without_self(x) for x in get_args(hint))]
    return hint

"""Every test run checks the annotations of functions: an import hook decorates them, each below its other decorators.

jaxtyping's own hook takes a sixth of a run: it decorates functions inside functions anew in each call, and binds the
arguments of every call, with or without arrays among them. Here functions inside functions are left to pyright, those
without arrays to beartype alone.
"""

import ast
import functools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Self, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped


def check(function: Callable) -> Callable:
    """Checks arguments and results of a function.

    Constructors stay as they are: ``jax.tree.map`` builds pytrees anew with leaves of any kind. ``Self`` means
    anything, because beartype knows it only in classes that it decorates as a whole.
    """
    function.__annotations__ = {name: _without_self(hint) for name, hint in function.__annotations__.items()}
    checked = beartype(function)
    if not any(map(_has_arrays, function.__annotations__.values())):
        return checked

    @functools.wraps(function)
    def with_sizes_of_its_own(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):  # a letter is one size in all arrays of a call
            return checked(*args, **kwargs)

    return with_sizes_of_its_own


def _without_self(hint: Any) -> Any:
    if hint is Self:
        return object
    if get_origin(hint) is tuple and Self in get_args(hint):
        return tuple[tuple(_without_self(x) for x in get_args(hint))]
    return hint


def _has_arrays(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_arrays, get_args(hint)))


def check_imports_of(*packages: str) -> None:
    """Functions of the modules below these packages that are imported from now on are checked."""
    sys.meta_path.insert(0, _Finder(packages))


class _Finder(PathFinder):
    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # type: ignore[override]
        if not any(fullname == package or fullname.startswith(f"{package}.") for package in self._packages):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_source(fullname) or "", self.path)
        _decorate(tree)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _CHECK, check)
        super().exec_module(module)


_CHECK = "__check_array_types__"


def _decorate(node: ast.AST) -> None:
    for part in ast.iter_child_nodes(node):
        if not isinstance(part, ast.FunctionDef):
            _decorate(part)
        elif part.name != "__init__":
            part.decorator_list.append(ast.copy_location(ast.Name(_CHECK, ast.Load()), part))

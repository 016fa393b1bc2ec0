"""Parameter trees: paths of their leaves, and one tree as two, of trained weights and of those that are only read."""

from collections.abc import Callable
from typing import Any

import jax

# Trees nested by module names. Their leaves are no part of the type: a recursive one makes each lookup a union.
Params = dict[str, Any]  # arrays
Uses = dict[str, Any]  # a WeightUse for each weight
Axes = dict[str, Any]  # the axis names of each weight
Shapes = dict[str, Any]  # a jax.ShapeDtypeStruct for each weight
Open = Any  # an array, or what is said of it in a tree of the same form
IsTrainable = Callable[[tuple[str, ...]], bool]  # of a weight's path


def paths(tree: object) -> list[str]:
    """Paths of all leaves, such as ``layers/0/attn/q``, sorted."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)


def all_trainable(path: tuple[str, ...]) -> bool:
    """Every weight is trained."""
    del path
    return True


def partition(params: Params, is_trainable: IsTrainable, path: tuple[str, ...] = ()) -> tuple[Params, Params]:
    """Splits a tree into the trainable weights and the frozen ones; a dict without any weight is left out.

    Args:
      params: nested dicts of anything.
      is_trainable: whether the weight at a path is trained.
      path: of ``params`` itself.
    """
    trainable: Params = {}
    frozen: Params = {}
    for name, value in params.items():
        at = (*path, name)
        if isinstance(value, dict):
            parts = partition(value, is_trainable, at)
            for tree, part in zip((trainable, frozen), parts, strict=True):
                if part:
                    tree[name] = part
        else:
            (trainable if is_trainable(at) else frozen)[name] = value
    return trainable, frozen


def merge(trainable: Params, frozen: Params) -> Params:
    """Undoes :func:`partition`.

    Raises:
      ValueError: a weight is in both trees.
    """
    merged = dict(trainable)
    for name, value in frozen.items():
        if name not in merged:
            merged[name] = value
        elif isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = merge(merged[name], value)
        else:
            raise ValueError(f"the weight {name} is both trainable and frozen")
    return merged

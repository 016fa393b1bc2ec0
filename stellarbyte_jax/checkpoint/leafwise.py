"""Trees of arrays written and read one leaf at a time, so that the largest of them bounds the memory."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.model.lazy import LazyArray

# Bytes of a part of an array on disk. Encoding and decoding hold a few parts; of an array in one part, the whole once
# more. Smaller ones come from the heap of the C library, which does not give them back.
_PART = 2**26


def save_args(tree: Any) -> Any:
    """For each array of a tree, that it is stored in parts."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PART), tree)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Reads a lazy array, writes it and drops it before the next one."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)  # nobody else has the array

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            for commit in await super().serialize([value.read()], [info], [arg]):
                commit.result()  # a thread of its own writes
        return []


def lazy_items(*names: str) -> Any:
    """Handlers for a checkpoint manager: of these items, which are trees of lazy arrays, and JSON for all others."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    types = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler()))
    for name in names:
        # One file for each part: a file for all of them holds what it was given until it is closed.
        handler: Any = ocp.PyTreeCheckpointHandler(type_handler_registry=types, use_ocdbt=False)
        registry.add(name, ocp.args.PyTreeSave, handler)
    registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry


def stored_leaves(item: Path, shapes: Any, read: Callable[[Path, tuple[str, ...], np.dtype], np.ndarray]) -> Any:
    """The arrays of an item as a tree of lazy ones.

    Args:
      item: the item's directory.
      shapes: what there must be, a leaf with ``dtype`` for each array.
      read: reads one, given the directory, its path in the tree and its dtype.

    Raises:
      ValueError: the item has other arrays.
    """
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(item).item_metadata.tree
    found, wanted = _by_path(tree), _by_path(shapes)
    apart = ["/".join(path) for path in sorted(found.keys() ^ wanted.keys())]
    if apart:
        raise ValueError(f"the arrays of {item.name} and those of the settings differ in {listed(apart)}")
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: LazyArray(
            tuple(found[_names(keys)].shape), np.dtype(leaf.dtype), partial(read, item, _names(keys), leaf.dtype)
        ),
        shapes,
    )


def read_leaf(item: Path, path: tuple[str, ...], dtype: np.dtype) -> np.ndarray:
    """One array of an item, without the others."""
    tree: Any = np.zeros(())
    args: Any = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    for name in reversed(path):
        tree, args = {name: tree}, {name: args}
    wanted = ocp.args.PyTreeRestore(item=tree, restore_args=args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as reader:
        (array,) = jax.tree.leaves(reader.restore(item, args=wanted))
    return array


def _by_path(tree: Any) -> Mapping[tuple[str, ...], Any]:
    return {_names(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _names(keys: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)

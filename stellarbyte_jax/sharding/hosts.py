"""Reading arrays whose parts lie on the devices of several processes."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_host(tree: Any) -> Any:
    """The arrays of a tree, whole and of numpy. Where one lies in parts on several processes, all have to call it."""
    return jax.tree.map(_on_host, tree)


def _on_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)

"""A network whose layers lie in several groups, though all are alike."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import numpy as np

from stellarbyte_jax.config import ByteConfig, LayerGroup
from stellarbyte_jax.model import decoder


@contextlib.contextmanager
def _grouped_by(groups: Callable[[ByteConfig], tuple[LayerGroup, ...]]) -> Iterator[None]:
    with mock.patch.object(ByteConfig, "layer_groups", property(groups)):
        decoder._abstract.cache_clear()
        yield
    decoder._abstract.cache_clear()


@contextlib.contextmanager
def grouped(*sizes: int) -> Iterator[None]:
    """Within it every network's layers lie in groups of so many layers; 0 means all that are left."""

    def groups(config: ByteConfig) -> tuple[LayerGroup, ...]:
        specs, found = config.layer_specs, []
        for size in sizes:
            taken = specs[: size or len(specs)]
            found.append(LayerGroup(taken, len(found)))
            specs = specs[len(taken) :]
        assert not specs
        return tuple(found)

    with _grouped_by(groups):
        yield


@contextlib.contextmanager
def one_group_each() -> Iterator[None]:
    """Within it every layer is a group of its own."""

    def groups(config: ByteConfig) -> tuple[LayerGroup, ...]:
        return tuple(LayerGroup((spec,), number) for number, spec in enumerate(config.layer_specs))

    with _grouped_by(groups):
        yield


def stacked(params):
    """Weights of several groups as those of one."""
    groups = [params["layers"][str(number)] for number in range(len(params["layers"]))]
    return {**params, "layers": {"0": jax.tree.map(lambda *parts: jax.device_put(np.concatenate(parts)), *groups)}}


def apart(params, *sizes):
    """Weights of one group as those of groups of so many layers."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    groups = {
        str(number): jax.tree.map(
            lambda x, a=end - size, b=end: jax.device_put(np.asarray(x)[a:b]), params["layers"]["0"]
        )
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }
    return {**params, "layers": groups}

"""Where each array of a run lies on its mesh."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from stellarbyte_jax.backend import start_problem
from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import ConfigError, TrainConfig
from stellarbyte_jax.config.mesh import check_mesh
from stellarbyte_jax.launch import processes
from stellarbyte_jax.model.decoder import ByteTransformer, param_uses, trained
from stellarbyte_jax.model.params import kept_spec
from stellarbyte_jax.model.trees import IsTrainable, all_trainable, partition
from stellarbyte_jax.sharding import device_mesh, make_mesh, spec_of
from stellarbyte_jax.training.state import TrainState


def mesh_of(config: TrainConfig) -> Mesh:
    """The mesh that a run asks for, of the first devices that there are.

    Raises:
      ConfigError: there are too few devices, or an axis does not divide what it cuts.
      MendableError: jax has several processes, which were not joined as a run's.
    """
    if jax.process_count() != processes.count():
        raise MendableError(
            f"jax has {jax.process_count()} processes that jax.distributed.initialize joined: call "
            "stellarbyte_jax.launch.processes.join in its place, so that one of them writes and all end together"
        )
    found = devices()
    sizes = config.mesh.sizes(len(found))
    parts, length = config.gradient_accumulation_steps, config.data.sequence_length
    check_mesh(sizes, config.model, config.global_batch_size, parts, length)
    if processes.count() > 1 and math.prod(sizes.values()) != len(found):
        raise ConfigError(
            f"the mesh uses {math.prod(sizes.values())} of the {len(found)} devices of {processes.count()} processes, "
            "and all have to take part: leave mesh.data=-1, or start fewer processes"
        )
    return make_mesh(sizes, found)


def devices() -> list[Any]:
    """All devices that a run may use.

    Raises:
      MendableError: JAX has none.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise MendableError(": ".join(start_problem(error))) from error


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Within it, arrays are split over the mesh. One device is none: programs are those without a mesh."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def placed(
    shapes: Any,
    model: ByteTransformer,
    optimizer: optax.GradientTransformation,
    is_trainable: IsTrainable = all_trainable,
    planned: AbstractMesh | None = None,
) -> Any:
    """The shapes of a :class:`TrainState` with where each array lies on the mesh that is set; as they are without one.

    What has a weight's shape lies where the weight does: its average and what the optimizer keeps of it. A ``planned``
    mesh, of devices that need not be there, stands for the one that is set.
    """
    mesh = planned or device_mesh()
    if mesh is None:
        return shapes

    def weights(uses: Any, shapes: Any) -> Any:
        return jax.tree.map(lambda use, shape: _at(shape, kept_spec(use, shape.shape, mesh), mesh), uses, shapes)

    uses, frozen_uses = partition(param_uses(model), trained(model, is_trainable))
    params = weights(uses, shapes.params)
    by_path = {names_of(path): shape for path, shape in jax.tree_util.tree_leaves_with_path(params)}

    def kept(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = names_of(path)
        found = (by_path.get(names[start:]) for start in range(len(names)))
        weight = next((weight for weight in found if weight is not None and weight.shape == shape.shape), None)
        return _at(shape, PartitionSpec() if weight is None else weight.sharding.spec, mesh)

    def carried(axes: tuple[str | None, ...], shape: Any) -> Any:
        return _at(shape, spec_of(axes, shape.shape, mesh), mesh)

    whole: Any = _at(shapes.step, PartitionSpec(), mesh)
    return TrainState(
        step=whole,
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(kept, shapes.opt_state),
        ema=None if shapes.ema is None else params,
        frozen=weights(frozen_uses, shapes.frozen),
        carried=shapes.carried.by_axes(carried),
        loss_scale=jax.tree.map(lambda shape: _at(shape, PartitionSpec(), mesh), shapes.loss_scale),
    )


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of dictionaries on the way to a leaf. An optimizer keeps trees of its own around those of weights."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def shardings(shapes: Any) -> Any:
    """Where arrays of :func:`placed` shapes lie, as ``jax.jit`` takes it; None without a mesh."""
    return None if device_mesh() is None else jax.tree.map(lambda shape: shape.sharding, shapes)


def place_batches() -> Callable[[Mapping[str, Any]], dict[str, jax.Array]]:
    """What puts a batch of arrays [rows, length] on the devices of the mesh that is set: rows are split.

    Other threads, which have no mesh set, may call it.
    """
    mesh = device_mesh()

    def place(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        if mesh is None:
            return {name: jax.device_put(x) for name, x in batch.items()}
        where = {name: spec_of(("batch", None), x.shape, mesh) for name, x in batch.items()}
        return {name: put(x, NamedSharding(mesh, where[name])) for name, x in batch.items()}

    return place


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array on the devices of all processes: itself where it lies so, else one that every process has whole."""
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicated() -> NamedSharding | None:
    """Where what every process reads lies: whole on each device of the mesh that is set; None without one."""
    mesh = device_mesh()
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _at(shape: jax.ShapeDtypeStruct, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

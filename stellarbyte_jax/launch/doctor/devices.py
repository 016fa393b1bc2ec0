"""The devices that JAX starts: whether it does, whether the run's mesh suits them, and how fast they are."""

from collections.abc import Callable, Iterator

import jax

from stellarbyte_jax.backend import start_problem
from stellarbyte_jax.config import ConfigError, TrainConfig
from stellarbyte_jax.config.mesh import check_mesh
from stellarbyte_jax.launch.doctor import gpus, measure, versions
from stellarbyte_jax.launch.doctor.finding import Finding, guarded
from stellarbyte_jax.sharding import make_mesh


def start_and_measure(
    config: TrainConfig, found: gpus.Gpus, machines: int, tell: Callable[[str], None]
) -> Iterator[Finding]:
    """Starts JAX's devices, lays the run's mesh over them, and measures them.

    Args:
      config: of the run that is to be.
      found: the GPUs of the machine.
      machines: of the run, each with as many devices as this one.
      tell: takes what is measured next.
    """
    try:
        devices = measure.within(measure.PATIENCE, jax.devices)
    except measure.HungError as error:
        yield measure.hung("starting JAX", error)
        return
    except (RuntimeError, AssertionError) as error:
        what, mend = start_problem(error)
        mend = f"{versions.pip_command(found.driver)}; else {mend}" if found.names else mend
        yield Finding("fault", "devices", what, mend)
        return
    kinds = [device.device_kind for device in devices]
    local = jax.local_devices()
    yield from guarded("devices", lambda: gpus.check_devices(found, devices[0].platform, kinds, len(local)))
    if not found.rows:
        yield from guarded("gpu memory", lambda: gpus.check_jax_memory(local))
    yield _check_mesh(config, machines * len(devices))
    mesh = make_mesh(_measured(config, len(devices)), devices)
    measured = list(guarded("collectives", lambda: measure.measure_collectives(mesh, tell)))
    yield from measured
    if not any(each.facts.get("hung") for each in measured):
        yield from guarded("products", lambda: measure.measure_products(local, tell))
    if devices[0].platform == "gpu":
        yield from guarded("cuda", versions.check_cuda)


def _check_mesh(config: TrainConfig, count: int) -> Finding:
    """Whether the mesh suits so many devices and divides what it cuts of the run, as training asks."""
    parts, length = config.gradient_accumulation_steps, config.data.sequence_length
    try:
        sizes = config.mesh.sizes(count)
        check_mesh(sizes, config.model, config.global_batch_size, parts, length)
    except ConfigError as error:
        what, _, mend = str(error).rpartition(": ")
        return Finding("fault", "mesh", what, mend)
    axes = " ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
    return Finding("ok", "mesh", f"{axes} on {count} devices", facts={"mesh": dict(sizes)})


def _measured(config: TrainConfig, count: int) -> dict[str, int]:
    """The axes that are measured: those of the run, or one axis where this machine has no room for them."""
    try:
        return config.mesh.sizes(count)
    except ConfigError:
        return {"data": count}

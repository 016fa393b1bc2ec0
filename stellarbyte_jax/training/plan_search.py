"""Which mesh, accumulation and remat suit a run and a number of devices."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.config.mesh import MeshConfig, check_mesh
from stellarbyte_jax.inspect.numbers import of_bytes
from stellarbyte_jax.training.plan import Plan, Planner

REMATS = ("none", "weights", "dots", "full")
MOST_DEVICES = 4096


class Found(NamedTuple):
    """What a search found.

    Attributes:
      best: the fastest plan that fits; None where none does.
      smallest: the plan that needs least memory; None where no mesh divides the run.
    """

    best: Plan | None
    smallest: Plan | None


def search(planner: Planner, devices: int) -> Found:
    """Looks at every mesh of so many devices, every number of parts of a batch, and every remat.

    Of plans that take the same time, the first in the order of meshes that cut less, fewer parts and less remat.
    """
    best: Plan | None = None
    smallest: Plan | None = None
    rows = planner.config.global_batch_size
    for sizes in _meshes(planner, devices):
        shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        for parts in (p for p in _divisors(rows // shards) if rows % (p * shards) == 0):
            fitted = False
            for remat in REMATS:
                plan = planner.plan(sizes, parts=parts, remat=remat)
                if smallest is None or plan.bytes.total < smallest.bytes.total:
                    smallest = plan
                if plan.fits and (best is None or plan.times.step < best.times.step):
                    best = plan
                if plan.fits:
                    fitted = remat == "none"
                    break  # what is computed again takes more time
            if fitted:
                break  # so do more parts
    return Found(best, smallest)


def would_do(planner: Planner, devices: int) -> str | None:
    """A mesh of so many devices that suits the run, or else of fewer, or of up to twice as many, in words; or None."""
    best = search(planner, devices).best
    if best is not None:
        return f"of {devices} devices, --set {settings(best)} would do"
    best = _first(planner, range(devices - 1, 0, -1))
    if best is not None:
        return f"of {devices} devices, {best.devices} with --set {settings(best)} would do"
    best = _first(planner, range(devices + 1, min(2 * devices, MOST_DEVICES) + 1))
    return None if best is None else f"--devices {best.devices} with --set {settings(best)} would do"


def _first(planner: Planner, counts: Iterable[int]) -> Plan | None:
    """The best plan for the first number of devices for which there is one."""
    config = planner.config
    # Axes divide the rows, the heads and half of the positions, so their product divides that of these.
    whole = config.global_batch_size * config.model.num_attention_heads * max(1, config.data.sequence_length // 2)
    plans = (search(planner, count).best for count in counts if whole % count == 0)
    return next((plan for plan in plans if plan is not None), None)


def settings(plan: Plan) -> str:
    """A plan as words of ``--set``."""
    mesh = [f"mesh.{name}={size}" for name, size in plan.sizes.items() if size > 1 or name == "data"]
    parts, remat = plan.config.gradient_accumulation_steps, plan.config.model.remat
    return " ".join([*mesh, f"gradient_accumulation_steps={parts}", f"model.remat={remat}"])


def advice(planner: Planner, devices: int, found: Found) -> str:
    """What to do about a run that does not fit, in one line."""
    kind, limit = planner.device.name, of_bytes(0.9 * planner.device.memory)
    if found.best is not None:
        return f"--set {settings(found.best)} takes {of_bytes(found.best.bytes.total)} of each device"
    if found.smallest is None:
        rows, known = planner.config.global_batch_size, would_do(planner, devices)
        return (
            f"no mesh of {devices} devices divides global_batch_size={rows}, heads, channels and positions: set "
            f"global_batch_size to a multiple of {devices}{'' if known is None else f'; {known}'}"
        )
    least = of_bytes(found.smallest.bytes.total)
    told = f"no mesh, accumulation and remat of {devices} x {kind} fits: the least is {least} of {limit} a device"
    more = _enough(planner, devices)
    if more is None:
        return f"{told}: lower data.sequence_length, model.hidden_size or model.num_hidden_layers"
    return f"{told}: --devices {more} would do, or lower data.sequence_length or model.hidden_size"


def _enough(planner: Planner, devices: int) -> int | None:
    """A number of devices, twice as many or more, on which the run fits."""
    while (devices := 2 * devices) <= MOST_DEVICES:
        if search(planner, devices).best is not None:
            return devices
    return None


def _meshes(planner: Planner, devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of all devices that divides the run, those that cut less first."""
    names = MeshConfig.names()
    config = planner.config
    found = []
    for sizes in _factors(devices, len(names)):
        mesh = dict(zip(names, sizes, strict=True))
        try:
            check_mesh(mesh, config.model, config.global_batch_size, 1, config.data.sequence_length)
        except ConfigError:
            continue
        found.append(mesh)
    return iter(sorted(found, key=lambda mesh: [mesh[name] for name in reversed(names)]))


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (number,)
        return
    for first in _divisors(number):
        yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def _divisors(number: int) -> list[int]:
    small = [d for d in itertools.takewhile(lambda d: d * d <= number, itertools.count(1)) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})

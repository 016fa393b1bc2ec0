"""Rates of collectives over each axis of a mesh, and of matrix products on each device, beside what they should be."""

import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stellarbyte_jax.launch.doctor.finding import Finding
from stellarbyte_jax.launch.hardware import Hardware, hardware_of

T = TypeVar("T")
PATIENCE = 120.0  # seconds for one measurement, compiling included: what takes longer hangs
_SIZES = {"cpu": (2**16, 2**20)}  # bytes, by platform
_LARGE = (2**16, 2**22, 2**28)  # of accelerators
_REPEATS = 5
_SHARE = 0.5  # of the peak of products, below which something is wrong
_LINK_SHARE = 0.4  # of that of a link: NCCL without multicast reached 0.49 to 0.63 on two healthy H200
_NEIGHBOURS = 0.8  # of the median over devices
_MATRIX = {"cpu": 512}
_LARGE_MATRIX = 8192
_PRODUCTS = 10  # in a row, so that starting them counts little
_IN_A_ROW = 10  # collectives, likewise


class HungError(RuntimeError):
    """A measurement did not end. Its thread is lost, and so are the devices to this process."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """Runs something in another thread, so that Ctrl-C and the clock still count where it hangs.

    Raises:
      HungError: it took longer.
    """
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise HungError(f"did not end within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      run: of a device's array [m] and an axis.
      bus: of n devices, the share of ``bytes`` that crosses a link, as nccl-tests count bus bandwidth.
      parts: whether a device holds 1/n of ``bytes`` before it.
    """

    run: Callable[[jax.Array, str, int], jax.Array]
    bus: Callable[[int], float]
    parts: bool = False


COLLECTIVES: Mapping[str, Collective] = {
    "all_reduce": Collective(lambda x, axis, n: jax.lax.psum(x, axis), lambda n: 2 * (n - 1) / n),
    "all_gather": Collective(
        lambda x, axis, n: jax.lax.all_gather(x, axis, tiled=True), lambda n: (n - 1) / n, parts=True
    ),
    "reduce_scatter": Collective(lambda x, axis, n: jax.lax.psum_scatter(x, axis, tiled=True), lambda n: (n - 1) / n),
    "all_to_all": Collective(lambda x, axis, n: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), lambda n: (n - 1) / n),
    "ppermute": Collective(
        lambda x, axis, n: jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]), lambda n: 1.0
    ),
}


def collective_program(mesh: Mesh, axis: str, name: str) -> Callable[[jax.Array], jax.Array]:
    """The compiled collective over one axis; its argument lies in equal parts [m] on all devices of the mesh."""
    n, spec = mesh.shape[axis], PartitionSpec(mesh.axis_names)
    run = COLLECTIVES[name].run
    mapped = jax.shard_map(lambda x: run(x, axis, n), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped)


def time_collective(mesh: Mesh, axis: str, name: str, size: int) -> float:
    """Seconds of one collective in a row of them: the median of several, after NCCL has its connections.

    On GPUs the next is started while one runs, so that starting counts little where much is exchanged.

    Args:
      mesh: of devices.
      axis: of the mesh.
      name: of the collective.
      size: bytes, as nccl-tests count them: of the larger one of a device's input and output.
    """
    n, program = mesh.shape[axis], collective_program(mesh, axis, name)
    each = max(n, size // 4 // (n if COLLECTIVES[name].parts else 1)) // n * n  # float32 numbers of one device
    lies = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.jit(lambda: jnp.ones(each * mesh.size, jnp.float32), out_shardings=lies)()
    count = 1 if mesh.devices.flat[0].platform == "cpu" else _IN_A_ROW  # threads of a CPU would wait for each other

    def work() -> None:
        y = program(x)
        for _ in range(1, count):
            y = program(x)
        y.block_until_ready()

    return _median(work) / count


def _median(work: Callable[[], object]) -> float:
    for _ in range(2):
        work()
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure_collectives(mesh: Mesh, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Each collective over each axis that has several devices.

    Args:
      mesh: of this machine's devices.
      tell: takes what is measured next.
    """
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    if not axes:
        yield Finding("ok", "collectives", "the mesh has one device, which exchanges nothing")
        return
    device = mesh.devices.flat[0]
    hardware = hardware_of(device.device_kind) if device.platform == "gpu" else None
    sizes = _SIZES.get(device.platform, _LARGE)
    for axis in axes:
        for name in COLLECTIVES:
            tell(f"{name} over {axis}")

            def work(axis: str = axis, name: str = name) -> dict[int, float]:
                return {size: time_collective(mesh, axis, name, size) for size in sizes}

            try:
                taken = within(PATIENCE, work)
            except HungError as error:
                yield hung(f"{name} over {axis}", error)
                return
            yield judge_collective(name, axis, mesh.shape[axis], taken, hardware)


def judge_collective(name: str, axis: str, n: int, taken: Mapping[int, float], hardware: Hardware | None) -> Finding:
    """One collective's rate beside that of the link.

    Args:
      name: of the collective.
      axis: of the mesh.
      n: devices of the axis.
      taken: bytes -> seconds.
      hardware: of the devices, None where no link is known.
    """
    rates = {size: size / seconds * COLLECTIVES[name].bus(n) for size, seconds in taken.items()}
    large, small = max(taken), min(taken)
    what = (
        f"{name} over {axis} ({n} devices): {rates[large] / 1e9:.1f} GB/s of the bus at {large / 2**20:g} MiB, "
        f"{1e6 * taken[small]:.0f} µs at {small / 2**10:g} KiB"
    )
    measured = [{"bytes": s, "seconds": taken[s], "bus_bytes_per_second": rates[s]} for s in sorted(taken)]
    facts: dict[str, Any] = {"collective": name, "axis": axis, "devices": n, "measured": measured}
    if hardware is None:
        return Finding("ok", "collectives", f"{what}; no link is known to compare with", facts=facts)
    facts["link_bytes_per_second"] = hardware.link_bytes
    what = f"{what}; {hardware.link} gives {hardware.link_bytes / 1e9:g} GB/s"
    if rates[large] < _LINK_SHARE * hardware.link_bytes:
        mend = "nvidia-smi topo -m shows how GPUs are linked, NCCL_DEBUG=INFO what NCCL uses; see the lines on nccl"
        return Finding("warning", "collectives", what, mend, facts)
    return Finding("ok", "collectives", what, facts=facts)


def hung(what: str, error: HungError) -> Finding:
    """A measurement that did not end."""
    mend = "NCCL_DEBUG=INFO tells where NCCL stands; try NCCL_NVLS_ENABLE=0, then NCCL_P2P_DISABLE=1; nvidia-smi -q"
    return Finding("fault", "collectives", f"{what} {error}: the devices hang", mend, {"hung": True})


def time_product(device: Any, size: int) -> float:
    """Operations a second of products of two bfloat16 matrices [size, size] on one device, the median of several."""
    keys = jax.random.split(jax.device_put(jax.random.key(0), device))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    multiply = jax.jit(jnp.matmul)

    def work() -> None:
        jax.block_until_ready([multiply(a, b) for _ in range(_PRODUCTS)])

    return 2 * size**3 * _PRODUCTS / _median(work)


def measure_products(devices: Sequence[Any], tell: Callable[[str], None]) -> Iterator[Finding]:
    """The rate of matrix products of each device, one after the other.

    Args:
      devices: of this process.
      tell: takes what is measured next.
    """
    rates = []
    for device in devices:
        tell(f"matrix products on device {device.id}")
        size = _MATRIX.get(device.platform, _LARGE_MATRIX)
        try:
            rates.append(within(PATIENCE, lambda device=device, size=size: time_product(device, size)))
        except HungError as error:
            yield hung(f"a matrix product on device {device.id}", error)
            return
    kinds = [device.device_kind for device in devices]
    yield from judge_products([device.id for device in devices], kinds, rates, devices[0].platform != "cpu")


def judge_products(
    ids: Sequence[int], kinds: Sequence[str], rates: Sequence[float], accelerators: bool = True
) -> Iterator[Finding]:
    """Each device's rate beside its peak and its neighbours'.

    Args:
      ids: of the devices.
      kinds: of the devices.
      rates: operations a second.
      accelerators: whether they compute apart from each other; simulated devices share the machine's cores.
    """
    middle = statistics.median(rates)
    for number, kind, rate in zip(ids, kinds, rates, strict=True):
        known = hardware_of(kind) if accelerators else None
        what = f"device {number} ({kind}): {rate / 1e12:.3g} TFLOP/s in bfloat16 products"
        facts: dict[str, Any] = {"device": number, "kind": kind, "flops_per_second": rate}
        if known is not None:
            what += f", {rate / known.bfloat16_flops:.0%} of its peak"
            facts["peak_flops_per_second"] = known.bfloat16_flops
        if accelerators and rate < _NEIGHBOURS * middle:
            mend = "compare its clocks, heat and processes with the others' (nvidia-smi -q -i N); leave it out"
            what += f"; the median of all is {middle / 1e12:.3g}"
            yield Finding("warning", "products", what, mend, facts)
        elif known is not None and rate < _SHARE * known.bfloat16_flops:
            mend = "look at clocks, heat and processes (nvidia-smi -q -d PERFORMANCE)"
            yield Finding("warning", "products", what, mend, facts)
        else:
            yield Finding("ok", "products", what, facts=facts)

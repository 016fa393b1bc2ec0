"""The doctor: what keeps a run from working on this machine, or makes it slow, each in a line."""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from stellarbyte_jax.backend import import_problem
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.launch.compile_cache import CompileCache
from stellarbyte_jax.launch.doctor import gpus, limits, places, versions
from stellarbyte_jax.launch.doctor.finding import Finding, guarded
from stellarbyte_jax.launch.doctor.peers import Peers, check_peers

__all__ = ["Finding", "Peers", "examine"]

# The doctor may run beside a run: it takes no more memory than it needs, and NVLink multicast can hang shared hosts.
_GENTLE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "NCCL_NVLS_ENABLE": "0"}


def examine(config: TrainConfig, peers: Peers | None, tell: Callable[[str], None]) -> Iterator[Finding]:
    """All checks, those that need no device first.

    Args:
      config: of the run that is to be: its mesh, directories and workers are looked at.
      peers: processes of other machines; None: there are none.
      tell: takes what is done next, where that takes a while.
    """
    python, required = versions.bounds()
    yield from guarded("python", lambda: versions.check_python(python))
    yield from guarded("packages", lambda: versions.check_packages(required))
    cannot = list(_import())
    yield from cannot
    found = gpus.find_gpus()  # before JAX takes memory of them
    yield from guarded("nvidia-smi", lambda: gpus.check_tool(found))
    yield from guarded("driver", lambda: versions.check_driver(found.driver, versions.cuda_of_wheels()))
    yield from guarded("gpu memory", lambda: gpus.check_memory(found, os.getpid()))
    yield from guarded("gpu state", lambda: gpus.check_state(found))
    yield from _environment(found)
    yield from _places(config)
    if not cannot:
        yield from _compile_cache()
    yield from guarded("open files", limits.check_open_files)
    yield from guarded("memory", lambda: limits.check_memory_limit(devices=_device_memory(found)))
    yield from guarded("cores", lambda: limits.check_cores(config.data.workers))
    if peers is not None:
        tell(f"waiting for {peers.host}:{peers.port}")
        yield from guarded("peers", lambda: check_peers(peers))
    if cannot:
        return
    tell("XLA_FLAGS" if os.environ.get("XLA_FLAGS") else "devices")
    flags = list(guarded("xla flags", lambda: limits.check_xla_flags(os.environ)))
    yield from flags
    if any(each.level == "fault" for each in flags):
        yield Finding("warning", "devices", "not started, nor measured: XLA_FLAGS would end this process", "see above")
        return
    with _gently():
        yield from _devices(config, found, 1 if peers is None else peers.processes, tell)


def _environment(found: gpus.Gpus) -> Iterator[Finding]:
    yield from guarded("xla client", lambda: limits.check_client(os.environ))
    yield from guarded("nccl", lambda: limits.check_nccl(os.environ, len(found.names)))


def _places(config: TrainConfig) -> Iterator[Finding]:
    output = Path(config.output_dir)
    directories = (
        ("output", output, "output_dir", 10),
        ("hub cache", Path(HF_HUB_CACHE), "HF_HOME", 1),
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR", 1),
        ("shared memory", Path("/dev/shm"), "size of it (docker: --shm-size; Kubernetes: an emptyDir in memory)", 1),
    )
    for name, path, setting, wanted in directories:
        yield from guarded(
            name,
            lambda name=name, path=path, setting=setting, wanted=wanted: places.check_directory(
                name, path, setting, wanted
            ),
        )
    yield from guarded("locks", lambda: places.check_locks(output))


def _import() -> Iterator[Finding]:
    """A fault where jax cannot be imported. What needs it is imported after this."""
    try:
        importlib.import_module("jax")
    except Exception as error:
        what, mend = import_problem(error) or (f"jax cannot be imported: {error}", "pip install -U jax jaxlib")
        yield Finding("fault", "jax", what, mend)


def _compile_cache() -> Iterator[Finding]:
    import jax

    CompileCache()
    cache = jax.config.values.get("jax_compilation_cache_dir")
    if cache:
        yield from guarded("compile cache", lambda: places.check_compile_cache(Path(str(cache))))
    else:
        yield Finding("warning", "compile cache", "no compile cache", "export JAX_COMPILATION_CACHE_DIR=DIR")


def _device_memory(found: gpus.Gpus) -> int:
    """Bytes of all GPUs, as far as they are told."""
    sizes = [row.get("memory.total", "") for row in found.rows]
    return sum(int(size) for size in sizes if size.isdecimal()) * 2**20


@contextlib.contextmanager
def _gently(settings: Mapping[str, str] = _GENTLE) -> Iterator[None]:
    """Sets variables that are not set, as long as devices are started and measured."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _devices(config: TrainConfig, found: gpus.Gpus, machines: int, tell: Callable[[str], None]) -> Iterator[Finding]:
    from stellarbyte_jax.launch.doctor.devices import start_and_measure  # with jax

    yield from start_and_measure(config, found, machines, tell)

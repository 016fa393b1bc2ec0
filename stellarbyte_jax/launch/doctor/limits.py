"""Limits of the process: open files, memory, cores, and what the environment's variables set."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from stellarbyte_jax.launch.doctor.finding import Finding, Level

GIB = 2**30
_FILES = 4096  # checkpoints, shards and connections of a large run together
_SECONDS = 120


def check_open_files(limits: tuple[int, int] | None = None) -> Iterator[Finding]:
    """The number of files that the process may open.

    Args:
      limits: soft and hard; None: those of this process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if limits is None else limits
    endless = resource.RLIM_INFINITY
    if soft != endless and soft < _FILES:
        most = "unlimited" if hard == endless else str(hard)
        mend = f"ulimit -n {most}" if hard == endless or hard >= _FILES else "raise the hard limit (limits.conf)"
        yield Finding("warning", "open files", f"{soft} files may be open, {_FILES} wanted", mend, {"soft": soft})
    else:
        yield Finding("ok", "open files", f"{'any number of' if soft == endless else soft} files may be open")


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the cgroup of this process may use, the least of those above it; None where there is no limit."""
    found = []
    listed = root / "proc/self/cgroup"
    lines = listed.read_text().splitlines() if listed.is_file() else []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        version_1 = "memory" in controllers.split(",")
        if controllers and not version_1:
            continue
        base = root / "sys/fs/cgroup" / ("memory" if version_1 else "")
        name = "memory.limit_in_bytes" if version_1 else "memory.max"
        below = base / group.strip("/")
        for folder in (below, *below.parents):
            if folder == base.parent:
                break
            file = folder / name
            if file.is_file() and (text := file.read_text().strip()).isdecimal() and int(text) < 2**60:
                found.append(int(text))
    return min(found, default=None)


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory."""
    text = (root / "proc/meminfo").read_text()
    found = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def check_memory_limit(root: Path = Path("/"), devices: int = 0) -> Iterator[Finding]:
    """The memory that the process may use, against that of the devices.

    Args:
      root: of the file system.
      devices: bytes of the devices' memory, through the machine's memory of which checkpoints go; 0: not known.
    """
    total, limit = machine_memory(root), memory_limit(root)
    usable = min(total, limit or total)
    what = f"{usable / GIB:.1f} GiB of memory" + (f" (cgroup; the machine has {total / GIB:.1f})" if limit else "")
    if usable < devices:
        mend = "ask for more memory (Slurm: --mem=0; Kubernetes: resources.limits.memory)"
        what = f"{what}, less than the {devices / GIB:.1f} GiB of the devices"
        yield Finding("warning", "memory", what, mend, {"bytes": usable})
    else:
        yield Finding("ok", "memory", what, facts={"bytes": usable})


def _quota(root: Path) -> float | None:
    """Cores that the cgroup may use, None where there is no limit."""
    file = root / "sys/fs/cgroup/cpu.max"
    quota, _, period = (file.read_text().strip() if file.is_file() else "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period or 100000)


def check_cores(workers: int, root: Path = Path("/"), cores: int | None = None) -> Iterator[Finding]:
    """The cores that the process may use against the processes that tokenize.

    Args:
      workers: ``data.workers``.
      root: of the file system.
      cores: None: those of this process.
    """
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    quota = _quota(root)
    usable = cores if quota is None else min(cores, quota)
    what = f"{usable:g} cores for the training process and data.workers={workers}"
    facts = {"cores": usable, "workers": workers}
    if workers + 1 > usable:
        least = max(0, int(usable) - 1)
        mend = f"--set data.workers={least}, or ask for more cores (Slurm: --cpus-per-task)"
        yield Finding("warning", "cores", what, mend, facts)
    else:
        yield Finding("ok", "cores", what, facts=facts)


_VARIABLES: tuple[tuple[str, str, str, str], ...] = (  # name, values that do harm, what they do, what to do
    ("NCCL_P2P_DISABLE", "1", "GPUs exchange through the machine's memory", "unset NCCL_P2P_DISABLE"),
    ("NCCL_IB_DISABLE", "1", "machines exchange over TCP, not InfiniBand or RoCE", "unset NCCL_IB_DISABLE"),
    ("NCCL_SHM_DISABLE", "1", "processes of a machine exchange over the network", "unset NCCL_SHM_DISABLE"),
    ("NCCL_SOCKET_IFNAME", "lo", "other machines cannot be reached", "name the interface that machines share"),
    ("NCCL_DEBUG", "TRACE", "each operation is written to the log", "export NCCL_DEBUG=WARN"),
    (
        "NCCL_NVLS_ENABLE",
        "1",
        "NVLink multicast is forced, and can hang on hosts that several containers share",
        "export NCCL_NVLS_ENABLE=0",
    ),
)


def check_nccl(environment: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    """Variables of NCCL that are known to do harm.

    Args:
      environment: variables.
      gpus: of this process.
    """
    given = {name: value for name, value in sorted(environment.items()) if name.startswith("NCCL_")}
    fine = dict(given)
    for name, bad, effect, mend in _VARIABLES:
        if given.get(name, "").upper() == bad.upper():
            del fine[name]
            yield Finding("warning", "nccl", f"{name}={given[name]}: {effect}", mend)
    listed = " ".join(f"{name}={value}" for name, value in fine.items())
    if "NCCL_NVLS_ENABLE" not in given and gpus > 1:
        advice = "NVLink multicast is NCCL's choice; export NCCL_NVLS_ENABLE=0 where several containers share the host"
        yield Finding("ok", "nccl", f"{advice}; it is off for what is measured here")
    if listed or not given:
        yield Finding("ok", "nccl", listed or "no variable of NCCL is set")


def check_client(environment: Mapping[str, str]) -> Iterator[Finding]:
    """How much of a device's memory JAX takes, and when."""
    names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR")
    given = {name: environment[name] for name in names if environment.get(name)}
    listed = " ".join(f"{name}={value}" for name, value in given.items())
    level: Level = "ok"
    what, mend = listed or "JAX takes 75 % of a GPU's memory when it starts (its default)", ""
    if given.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        level, mend = "warning", "unset XLA_PYTHON_CLIENT_ALLOCATOR: it asks the driver for each array, which is slow"
    elif given.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0"):
        level, mend = "warning", "unset XLA_PYTHON_CLIENT_PREALLOCATE for training: memory falls into small pieces"
    yield Finding(level, "xla client", what, mend, given)


def check_xla_flags(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether this jaxlib knows the flags of ``XLA_FLAGS``: at an unknown one XLA ends the process.

    So it is another process that tries, on the CPU, whose devices read the same flags.
    """
    flags = environment.get("XLA_FLAGS", "").strip()
    if not flags:
        yield Finding("ok", "xla flags", "XLA_FLAGS is not set")
        return
    program = "import jax; jax.devices('cpu')"
    tried = dict(environment) | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], env=tried, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        mend = "start again without XLA_FLAGS"
        yield Finding("fault", "xla flags", f"JAX did not start within {_SECONDS} s under XLA_FLAGS={flags}", mend)
        return
    unknown = re.search(r"Unknown flags? in XLA_FLAGS: *(.+)", done.stderr)
    if unknown:
        mend = "take them out of XLA_FLAGS: every process that uses JAX ends at them"
        yield Finding("fault", "xla flags", f"this jaxlib does not know {unknown[1].strip()}", mend)
    elif done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("fault", "xla flags", f"JAX cannot start under XLA_FLAGS={flags}: {last}", "take them out")
    else:
        yield Finding("ok", "xla flags", f"XLA_FLAGS={flags}, all known")

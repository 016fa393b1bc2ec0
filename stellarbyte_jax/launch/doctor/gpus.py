"""The GPUs of the machine, as their driver tells of them, beside the devices that JAX finds."""

import csv
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stellarbyte_jax.launch.doctor.finding import Finding
from stellarbyte_jax.launch.doctor.versions import pip_command

_SECONDS = 30
_REASONS = {  # bits of clocks_event_reasons.active that mean trouble; the driver's library NVML names them
    0x08: "slowed down by the hardware",
    0x20: "too hot (software limit)",
    0x40: "too hot (hardware limit)",
    0x80: "power brake of the machine",
}
_BUSY_SHARE = 0.05  # of memory that others have, which is more than a display takes


@dataclass(frozen=True)
class Gpus:
    """What the driver tells.

    Attributes:
      names: of the GPUs.
      driver: its version, None where there is none.
      tool: whether nvidia-smi could be asked; /proc tells names alone.
      problem: why nvidia-smi, which is there, told nothing.
      rows: of each GPU, the fields that nvidia-smi knows.
      processes: on the GPUs, as (process, name, MiB).
    """

    names: tuple[str, ...] = ()
    driver: str | None = None
    tool: bool = False
    problem: str = ""
    rows: tuple[Mapping[str, str], ...] = ()
    processes: tuple[tuple[str, str, str], ...] = field(default=())


_GROUPS = (  # a tool that lacks one field refuses the whole query
    ("memory.total", "memory.free", "memory.used"),
    ("clocks.sm", "clocks.max.sm", "temperature.gpu"),
    ("persistence_mode", "ecc.mode.current", "mig.mode.current"),
    ("ecc.errors.uncorrected.volatile.total",),
    ("clocks_event_reasons.active",),
    ("clocks_throttle_reasons.active",),  # its name before driver 535
)


def _ask(query: str, fields: Sequence[str]) -> list[list[str]]:
    """Rows of a query of nvidia-smi.

    Raises:
      FileNotFoundError: there is no such tool.
      OSError: it failed, or did not answer.
    """
    command = ["nvidia-smi", f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi did not answer within {_SECONDS} s") from None
    if done.returncode:
        raise OSError((done.stdout + done.stderr).strip() or f"nvidia-smi ended with status {done.returncode}")
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]
    return [row for row in rows if len(row) == len(fields)]


def find_gpus(proc: Path = Path("/proc/driver/nvidia")) -> Gpus:
    """Asks nvidia-smi, and /proc where it is absent or tells nothing."""
    try:
        found = _ask("gpu", ("index", "name", "driver_version"))
    except FileNotFoundError:
        return _from_proc(proc, "")
    except OSError as error:
        return _from_proc(proc, str(error))
    rows: list[dict[str, str]] = [{"index": index, "name": name} for index, name, _ in found]
    for fields in _GROUPS:
        try:
            told = _ask("gpu", fields)
        except OSError:  # this tool lacks the field
            continue
        for row, values in zip(rows, told, strict=False):
            row.update(zip(fields, values, strict=True))
    try:
        processes = tuple((p, n, m) for p, n, m in _ask("compute-apps", ("pid", "process_name", "used_memory")))
    except OSError:
        processes = ()
    driver = found[0][2] if found else None
    return Gpus(tuple(name for _, name, _ in found), driver, True, "", tuple(rows), processes)


def _from_proc(proc: Path, problem: str) -> Gpus:
    names = []
    for file in sorted(proc.glob("gpus/*/information")):
        model = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        names.append(model[1].strip() if model else "unknown GPU")
    version = proc / "version"
    found = re.search(r"Kernel Module\D*\s([\d.]+)", version.read_text(errors="replace")) if version.is_file() else None
    return Gpus(tuple(names), found[1] if found else None, False, problem)


def check_tool(gpus: Gpus) -> Iterator[Finding]:
    """What lists the GPUs."""
    if gpus.problem:
        mend = (
            "the driver and its tool disagree or a GPU is lost: restart the machine or the container, then nvidia-smi"
        )
        yield Finding("fault", "nvidia-smi", f"nvidia-smi failed: {gpus.problem}", mend)
    elif not gpus.tool:
        told = f"/proc lists {len(gpus.names)} GPUs; clocks, errors and processes are not told" if gpus.names else ""
        yield Finding("ok", "nvidia-smi", f"no nvidia-smi here; {told or 'no NVIDIA GPU found'}")
    elif not gpus.names:
        mend = "start the container with its GPUs (--gpus all), or mend the driver"
        yield Finding("warning", "nvidia-smi", "nvidia-smi lists no GPU", mend)


def check_devices(
    gpus: Gpus, platform: str, kinds: Sequence[str], local: int, environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """The devices that JAX finds against the GPUs of the machine.

    Args:
      gpus: of the machine.
      platform: of JAX's devices, such as ``gpu``.
      kinds: of all devices.
      local: number of this process's devices.
      environment: variables.
    """
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    facts = {"platform": platform, "devices": len(kinds), "gpus": list(gpus.names)}
    there = len(gpus.names)
    what = f"JAX finds {counted}"
    if not there:
        told = f"{what}; this machine has no GPU that the driver lists" if platform == "cpu" else what
        yield Finding("ok", "devices", told, facts=facts)
        return
    what += f"; the driver lists {there} x {gpus.names[0]}"
    if platform == "cpu":
        chosen = next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if environment.get(name)), None)
        if chosen:
            told = f"{what}, and {chosen}={environment[chosen]} keeps JAX from them"
            yield Finding("warning", "devices", told, f"unset {chosen}", facts)
        else:
            yield Finding("fault", "devices", what, pip_command(gpus.driver), facts)
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if local >= there:
        yield Finding("ok", "devices", what, facts=facts)
    elif visible is not None:
        yield Finding("ok", "devices", f"{what}; CUDA_VISIBLE_DEVICES={visible}", facts=facts)
    else:
        mend = "nvidia-smi -L tells which one is lost: restart the machine, or leave it out with CUDA_VISIBLE_DEVICES"
        yield Finding("fault", "devices", what, mend, facts)


def check_memory(gpus: Gpus, own: int | None = None) -> Iterator[Finding]:
    """Free and total memory of each GPU, and other processes on them.

    Args:
      gpus: of the machine, asked before JAX took memory.
      own: this process.
    """
    others = [(process, name, memory) for process, name, memory in gpus.processes if process != str(own)]
    for row in gpus.rows:
        total, free = _number(row.get("memory.total")), _number(row.get("memory.free"))
        if total is None or free is None:
            continue
        what = f"GPU {row['index']}: {free / 1024:.1f} of {total / 1024:.1f} GiB free"
        facts = {"index": row["index"], "free_mib": free, "total_mib": total}
        if 1 - free / total > _BUSY_SHARE:
            mend = "end what uses it (nvidia-smi lists it), or leave the GPU out with CUDA_VISIBLE_DEVICES"
            yield Finding("warning", "gpu memory", what, mend, facts)
        else:
            yield Finding("ok", "gpu memory", what, facts=facts)
    if others:
        listed = ", ".join(f"{process} {Path(name).name} ({memory} MiB)" for process, name, memory in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        yield Finding("warning", "gpu processes", f"other processes: {listed}{more}", "end them, or use other GPUs")


def check_jax_memory(devices: Sequence[Any]) -> Iterator[Finding]:
    """What JAX may take of each device's memory, for machines whose nvidia-smi tells nothing.

    Args:
      devices: of this process.
    """
    for device in devices:
        stats = device.memory_stats() or {}
        limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
        if limit is not None:
            free = f"{(limit - used) / 2**30:.1f} of {limit / 2**30:.1f} GiB"
            what = f"device {device.id}: {free} that JAX may take are free"
            facts = {"index": str(device.id), "free_mib": (limit - used) / 2**20, "total_mib": limit / 2**20}
            yield Finding("ok", "gpu memory", what, facts=facts)


def check_state(gpus: Gpus) -> Iterator[Finding]:
    """Clocks, what slows them, persistence mode, MIG and memory errors of each GPU."""
    for row in gpus.rows:
        yield from _clocks(row)
        name = f"GPU {row['index']}"
        if row.get("persistence_mode") == "Disabled":
            mend = "nvidia-smi -pm 1 as root, else the driver unloads between runs and each start waits for it"
            yield Finding("warning", "gpu state", f"{name}: persistence mode is off", mend)
        if row.get("mig.mode.current") == "Enabled":
            mend = "whole GPUs are needed for NCCL: ask for one, or run on this part alone"
            yield Finding("warning", "gpu state", f"{name} is cut into parts (MIG)", mend)
        errors = _number(row.get("ecc.errors.uncorrected.volatile.total"))
        if errors:
            what = f"{name}: {errors:.0f} memory errors that ECC could not correct"
            yield Finding("fault", "gpu state", what, "nvidia-smi -r, and have the GPU looked at where they come back")
        elif row.get("ecc.mode.current") == "Disabled":
            mend = "nvidia-smi -e 1 as root, then restart: without it a flipped bit spoils weights unseen"
            yield Finding("warning", "gpu state", f"{name}: ECC is off", mend)


def _clocks(row: Mapping[str, str]) -> Iterator[Finding]:
    told = row.get("clocks_event_reasons.active", row.get("clocks_throttle_reasons.active", ""))
    try:
        bits = int(told, 16)
    except ValueError:  # "[N/A]", or not told
        bits = 0
    reasons = [text for bit, text in _REASONS.items() if bits & bit]
    now, most = row.get("clocks.sm"), row.get("clocks.max.sm")
    if now is None or most is None:
        return
    what = f"GPU {row['index']}: {now} of {most} MHz, {row.get('temperature.gpu', '?')} °C"
    if reasons:
        mend = "look at cooling and power of the machine (nvidia-smi -q -d PERFORMANCE,TEMPERATURE)"
        yield Finding("warning", "gpu clocks", f"{what}: {', '.join(reasons)}", mend)
    else:
        yield Finding("ok", "gpu clocks", what)


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "[N/A]"
        return None

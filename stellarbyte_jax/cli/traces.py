"""Profiles of measured steps, and the share of time that devices spend in collectives."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stellarbyte_jax.command import imports

STEPS = 3
_COLLECTIVES = ("nccl", "allreduce", "all_reduce", "all_to_all", "alltoall")
Interval = tuple[float, float]


def collective_shares(directory: Path) -> dict[str, float]:
    """What the newest trace below a directory says of collectives; nothing where it has no kernels of a GPU.

    Returns:
      ``collectives``: share of the traced time in which a device runs a kernel of NCCL, waiting for other devices
      included; ``collectives_alone``: in which it runs nothing else. Means over the devices.
    """
    with imports():
        from jax.profiler import ProfileData

    files = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return shares(ProfileData.from_file(str(files[-1]))) if files else {}


def shares(profile: Any) -> dict[str, float]:
    """The same of a ``jax.profiler.ProfileData``."""
    found = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        within: list[Interval] = []
        others: list[Interval] = []
        for event in (event for line in plane.lines if line.name.startswith("Stream") for event in line.events):
            is_collective = any(name in event.name.lower() for name in _COLLECTIVES)
            (within if is_collective else others).append((event.start_ns, event.start_ns + event.duration_ns))
        ends = [*within, *others]
        if ends:
            span = max(end for _, end in ends) - min(start for start, _ in ends)
            busy = covered(ends)
            found.append((covered(within) / span, (busy - covered(others)) / span))
    if not found:
        return {}
    names = ("collectives", "collectives_alone")
    return {
        name: round(sum(values) / len(found), 4) for name, values in zip(names, zip(*found, strict=True), strict=True)
    }


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total

"""How long the exchanges of a plan take on a mesh of several machines, latency included.

``Exchange.seconds`` is bytes over the slowest link of an axis. Here a group of devices uses the network adapters of all
its devices of a machine, and each call costs time that grows with the group. On paper: no run of several machines has
been compared with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stellarbyte_jax.training.plan import Plan
from stellarbyte_jax.training.plan_devices import DEVICES_OF_A_MACHINE
from stellarbyte_jax.training.plan_exchange import Exchange

_MICRO = 1e-6


class Protocol(NamedTuple):
    """A protocol of NCCL's: its latencies in microseconds, and its share of the bandwidth.

    Attributes:
      base: of a call.
      near: of a step of a ring within a machine.
      far: of a step to another machine.
      alone: the same where the group has one device of each machine.
      tree: of a step of a tree within a machine; one to another machine takes ``alone``.
      share: of the bandwidth.
    """

    base: float
    near: float
    far: float
    alone: float
    tree: float
    share: float


# The model by which NCCL chooses (baseLat, hwLat, ncclTopoTuneModel), of its protocols Simple and LL128:
# https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc
PROTOCOLS = (Protocol(8.4, 3.4, 14.0, 14.0, 4.0, 1.0), Protocol(14.0, 1.9, 4.0, 8.5, 1.25, 0.92))
_TREE_SHARE, _PAT_SHARE = 0.92, 0.75


@dataclass(frozen=True)
class Links:
    """What collectives get of the links.

    Attributes:
      bus: bytes a second within a machine by kind of collective, as nccl-tests count bus bandwidth.
      network: bytes a second of the network adapter that each device has, one way.
      latency: times NCCL's figures.
    """

    bus: Mapping[str, float]
    network: float
    latency: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Seconds of an exchange in a step.

    Attributes:
      link: ``NVLink`` or ``network``: the one that takes longer.
      bytes: for the bytes.
      latency: beside that.
    """

    link: str
    bytes: float
    latency: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.bytes + self.latency


def cost(exchange: Exchange, plan: Plan, links: Links) -> Cost:
    """How long an exchange takes, by the fastest of NCCL's algorithms and protocols.

    A ring goes through a machine by all its devices of the group, and NCCL lays as many rings as there are adapters:
    where g devices of a machine are in the group, an adapter sends 1/g of what a device sends. In an all-to-all each
    device's adapter sends what is for other machines.
    """
    n, g = group(exchange.axis, plan.sizes)
    near = exchange.sent / links.bus[exchange.kind] if g > 1 else 0.0
    share = (n - g) / (n - 1) if exchange.kind == "all-to-all" else 1 / g
    far = exchange.sent * share / links.network if n > g else 0.0
    slower, times = max(near, far), calls(exchange, plan) * links.latency
    found = (
        Cost("network" if far > near else "NVLink", slower / s, times * late) for late, s in ways(exchange.kind, n, g)
    )
    return min(found, key=lambda each: each.seconds)


def group(axis: str, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Devices that exchange along an axis, or several joined by ``+``, and how many of them one machine has."""
    names = axis.split("+")
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    members = grid[tuple(slice(None) if name in names else 0 for name in sizes)].ravel()
    return members.size, int((members < DEVICES_OF_A_MACHINE).sum())


def ways(kind: str, n: int, g: int) -> list[tuple[float, float]]:
    """NCCL's ways to do a collective of n devices, g of each machine: seconds of latency, share of the bandwidth."""
    if kind in ("all-to-all", "collective-permute"):
        return [(_MICRO * (p.base + (p.far if n > g else p.near)), p.share) for p in PROTOCOLS]
    machines, rounds = n // g, 2 if kind == "all-reduce" else 1
    found = []
    for p in PROTOCOLS:
        far = p.alone if g == 1 else p.far
        ring = p.base + rounds * ((n - machines) * p.near + (machines - 1) * far)
        found.append((_MICRO * ring, p.share))
        if kind == "all-reduce":
            tree = p.base + 2 * ((g - 1) * p.tree + math.log2(machines) * p.alone)
            found.append((_MICRO * tree, _TREE_SHARE * p.share))
    if kind != "all-reduce" and g == 1:  # PAT, which NCCL has for such groups alone
        found.append((_MICRO * (8 + math.log2(n) * PROTOCOLS[0].alone / 3.5 + 2.8 * n), _PAT_SHARE))
    return found


def calls(exchange: Exchange, plan: Plan) -> int:
    """How often a collective is called in a step, if XLA joins all weights of a layer into one; counted by hand."""
    m, parts = plan.config.model, plan.config.gradient_accumulation_steps
    L, again, all_again = m.num_hidden_layers, m.remat in ("dots", "full"), m.remat == "full"
    branches, experts = 1 if m.parallel_residual else 2, len(m.moe_layers)
    gathers = exchange.kind == "all-gather"
    if exchange.what == "tokens" and exchange.kind == "all-to-all":
        times = experts * (4 + 2 * all_again)
    elif exchange.what == "tokens":
        times = experts * (2 + (all_again and gathers))
    elif exchange.what == "activations" and gathers:
        times = L * branches * (2 + again) + 2
    elif exchange.what == "activations":
        times = L * (branches + 4 + (branches - 1) * all_again) + 2
    elif exchange.what == "keys and values":
        times = L * 2 * (plan.sizes["context"] - 1) * (2 + again)
    else:
        times = (2 if gathers else 1) * (L + 2)  # embedding and head apart
    return parts * times

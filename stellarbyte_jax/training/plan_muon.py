"""What an update of Muon takes of each device, in a plan. That of other optimizers goes number by number."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from stellarbyte_jax.ops.newton_schulz import ROUNDS, at_once
from stellarbyte_jax.sharding.matrices import Deal, deals
from stellarbyte_jax.training.muon import stack_of
from stellarbyte_jax.training.plan_devices import ASSUMED, Device
from stellarbyte_jax.training.plan_exchange import AXES, Exchange

_FLOAT32 = 4
_SLOWER = 2  # products of float32 (as TF32, which jax takes on GPUs) than those of bfloat16, by the data sheets
_TOGETHER = 0.7  # of what all deals take, that compiled programs hold at once where no deal is much larger


@dataclass(frozen=True)
class Update:
    """Of a step, whatever the parts of its batch.

    Attributes:
      exchanges: of matrices, to where they are whole and back.
      buffers: bytes of all results, as they are kept, and of the matrices that are whole at once.
      flops: of a device, in float32.
    """

    exchanges: tuple[Exchange, ...] = ()
    buffers: int = 0
    flops: float = 0.0

    def seconds(self, device: Device) -> float:
        """Of its products."""
        return _SLOWER * self.flops / (ASSUMED.products * device.flops)


def of_update(optimizer: str, params: Any, uses: Any, sizes: Mapping[str, int]) -> Update:
    """The update of an optimizer.

    Args:
      optimizer: its name.
      params: shapes with shardings of the trained weights, as ``placement.placed`` gives them.
      uses: of these weights.
      sizes: of the mesh.
    """
    if optimizer != "muon":
        return Update()
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(uses), strict=True)
    stacks = [stack_of(use, x.shape, x.sharding.mesh) for x, use in leaves if use.is_hidden_matrix]
    found = deals(stacks, sizes)
    sent: dict[str, int] = {}
    for deal in found:
        axes = "+".join(axis for axis in AXES if axis in deal.axes)
        # Each device sends all but its own block, there and back.
        sent[axes] = sent.get(axes, 0) + 2 * _FLOAT32 * deal.numbers // deal.devices * (deal.devices - 1)
    exchanges = tuple(Exchange("all-to-all", axes, "matrices", size) for axes, size in sent.items() if size)
    kept = _FLOAT32 * sum(deal.matrices * math.prod(deal.part) for deal in found)
    whole = list(map(_whole_bytes, found))
    return Update(exchanges, kept + round(max([*whole, _TOGETHER * sum(whole)])), sum(map(_flops, found)))


def _whole_bytes(deal: Deal) -> int:
    """What came, what is made of it, and three squares besides for those that are computed at once."""
    rows, columns = deal.whole
    computed = at_once(deal.each, rows, columns)
    return _FLOAT32 * (2 * deal.numbers + computed * (rows * columns + 3 * rows * rows))


def _flops(deal: Deal) -> float:
    rows, columns = deal.whole
    return deal.each * ROUNDS * (2 * 2 * rows * rows * columns + 2 * rows**3)

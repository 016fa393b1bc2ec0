"""What one layer is, and which layers are stacked together."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class LayerSpec(NamedTuple):
    """What may differ between layers. All but ``moe`` leaves the shapes of weights as they are.

    Attributes:
      window: number of keys that a token sees, itself included; None for all.
      recent: memory slots for the newest states.
      compressed: memory slots for compressed older states.
      moe: whether the feed-forward part is a mixture of experts.
    """

    window: int | None
    recent: int = 0
    compressed: int = 0
    moe: bool = False

    @property
    def memory_slots(self) -> int:
        """All memory slots of the layer, the compressed ones first."""
        return self.compressed + self.recent


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of one scan. Those with the same weights share a stack ``[L, ...]`` of each.

    The specs need not be equal. The scan's body holds the layers of one period of them, so what is static in a layer
    (its window above all) is static in the compiled program too; layer ``i`` is place ``i % period`` of the body. The
    last period may be cut short: its layers come after the scan.

    Attributes:
      specs: one for each layer.
      first_stack: number of the group's first stack of weights. A group whose layers are all dense, or all have
        experts, has one; else the second one is that of the kind that comes later.
    """

    specs: tuple[LayerSpec, ...]
    first_stack: int = 0

    @property
    def period(self) -> tuple[LayerSpec, ...]:
        """The shortest run of specs that repeats itself to the end of the group; all of them where none comes twice."""
        size = _period(self.specs)
        return self.specs[: size or len(self.specs)]

    @property
    def repeats(self) -> int:
        """How often the whole period comes: the length of the scan."""
        return len(self.specs) // len(self.period)

    @property
    def tail(self) -> tuple[LayerSpec, ...]:
        """The layers after the last whole period."""
        return self.specs[self.repeats * len(self.period) :]

    @property
    def layers_of_places(self) -> tuple[int, ...]:
        """How many layers are at each place of the period."""
        return tuple(self.repeats + (place < len(self.tail)) for place in range(len(self.period)))

    @property
    def stacks(self) -> tuple[int, ...]:
        """Numbers of the group's stacks."""
        return tuple(range(self.first_stack, self.first_stack + len({spec.moe for spec in self.specs})))

    def stack_of(self, spec: LayerSpec) -> int:
        """The stack that holds the weights of a layer."""
        return self.first_stack + (spec.moe != self.specs[0].moe)

    def of_stack(self, stack: int) -> tuple[LayerSpec, ...]:
        """The layers whose weights a stack holds, in order."""
        return tuple(spec for spec in self.specs if self.stack_of(spec) == stack)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each layer its stack, and its row there."""
        rows = dict.fromkeys(self.stacks, 0)
        found = []
        for spec in self.specs:
            stack = self.stack_of(spec)
            found.append((stack, rows[stack]))
            rows[stack] += 1
        return tuple(found)


def group_layers(specs: Sequence[LayerSpec]) -> tuple[LayerGroup, ...]:
    """Layers in order as groups.

    They are one where dense ones and those with experts take turns regularly. Else the dense ones before the first with
    experts are one, and the others another; or, where they take no regular turns, each run of one kind.
    """
    kinds = [spec.moe for spec in specs]
    first = kinds.index(True) if True in kinds else 0
    if _period(kinds) is not None:
        parts = [tuple(specs)]
    elif _period(kinds[first:]) is not None:
        parts = [tuple(specs[:first]), tuple(specs[first:])]
    else:
        parts = [tuple(run) for _, run in itertools.groupby(specs, lambda spec: spec.moe)]
    groups: list[LayerGroup] = []
    for part in parts:
        if part:
            groups.append(LayerGroup(part, groups[-1].stacks[-1] + 1 if groups else 0))
    return tuple(groups)


def _period(items: Sequence[object]) -> int | None:
    """The length of the shortest run that repeats itself to the end, at least twice; None where there is none."""
    sizes = range(1, len(items) // 2 + 1)
    return next((n for n in sizes if all(x == items[i % n] for i, x in enumerate(items))), None)

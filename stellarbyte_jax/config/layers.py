"""What one layer is, and which layers are stacked together."""

from dataclasses import dataclass
from typing import NamedTuple


class LayerSpec(NamedTuple):
    """What may differ between layers whose weights have the same shapes.

    Attributes:
      window: number of keys that a token sees, itself included; None for all.
      recent: memory slots for the newest states.
      compressed: memory slots for compressed older states.
    """

    window: int | None
    recent: int = 0
    compressed: int = 0

    @property
    def memory_slots(self) -> int:
        """All memory slots of the layer, the compressed ones first."""
        return self.compressed + self.recent


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers with the same weights: one stack ``[L, ...]`` of each, and one scan.

    The specs need not be equal. The scan's body holds the layers of one period of them, so what is static in a layer
    (its window above all) is static in the compiled program too; layer ``i`` is place ``i % period`` of the body. The
    last period may be cut short: its layers come after the scan.

    Attributes:
      specs: one for each layer.
    """

    specs: tuple[LayerSpec, ...]

    @property
    def period(self) -> tuple[LayerSpec, ...]:
        """The shortest run of specs that repeats itself to the end of the group; all of them where none comes twice."""
        for size in range(1, len(self.specs) // 2 + 1):
            if all(spec == self.specs[i % size] for i, spec in enumerate(self.specs)):
                return self.specs[:size]
        return self.specs

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

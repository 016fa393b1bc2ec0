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
    (its window above all) is static in the compiled program too; layer ``i`` is place ``i % period`` of the body.

    Attributes:
      specs: one for each layer.
    """

    specs: tuple[LayerSpec, ...]

    @property
    def period(self) -> tuple[LayerSpec, ...]:
        """The shortest run of specs that repeats itself through the whole group."""
        for size in range(1, len(self.specs) + 1):
            if len(self.specs) % size == 0 and self.specs[:size] * self.repeats_of(size) == self.specs:
                return self.specs[:size]
        raise AssertionError("a group holds at least one layer")

    @property
    def repeats(self) -> int:
        """How often the period comes: the length of the scan."""
        return self.repeats_of(len(self.period))

    def repeats_of(self, size: int) -> int:
        """How many runs of ``size`` layers the group holds."""
        return len(self.specs) // size

"""Statistics of weights by layer and part: mean, spread, largest magnitude, and the share of small ones."""

from dataclasses import dataclass, field

import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.section import require
from stellarbyte_jax.inspect.costs import PARTS, Piece, pieces
from stellarbyte_jax.model.trees import Params

THRESHOLDS = (1e-4, 1e-3, 1e-2)
_AT_ONCE = 1 << 22  # numbers that are float64 at the same time


@dataclass
class WeightStatistics:
    """Of the weights of one part of one layer, or of several.

    Attributes:
      count: number of weights.
      total: their sum.
      squares: sum of their squares.
      largest: magnitude of the largest.
      zeros: how many are exactly 0.
      below: for each threshold how many have a smaller magnitude, zeros included.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    zeros: int = 0
    below: dict[float, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean."""
        return self.total / self.count

    @property
    def std(self) -> float:
        """Standard deviation around the mean."""
        return float(np.sqrt(np.maximum(0.0, self.squares / self.count - self.mean**2)))  # unlike max(), keeps NaN

    def share(self, threshold: float) -> float:
        """Share of the weights with a magnitude below a threshold; of the zeros for 0."""
        return (self.below[threshold] if threshold else self.zeros) / self.count

    def add(self, x: np.ndarray, thresholds: tuple[float, ...]) -> None:
        """Counts an array, converting a piece of it to float64 at a time."""
        flat = x.reshape(-1)
        for start in range(0, flat.size, _AT_ONCE):
            part = flat[start : start + _AT_ONCE].astype(np.float64)
            size = np.abs(part)
            self.count += part.size
            self.total += float(part.sum())
            self.squares += float(np.square(part).sum())
            self.largest = float(np.maximum(self.largest, size.max()))
            self.zeros += int((size == 0).sum())
            for threshold in thresholds:
                self.below[threshold] = self.below.get(threshold, 0) + int((size < threshold).sum())

    def merged(self, other: "WeightStatistics") -> "WeightStatistics":
        """Of both."""
        return WeightStatistics(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            float(np.maximum(self.largest, other.largest)),
            self.zeros + other.zeros,
            {t: self.below.get(t, 0) + other.below.get(t, 0) for t in self.below | other.below},
        )


@dataclass(frozen=True)
class Statistics:
    """Of a whole model.

    Attributes:
      thresholds: of :meth:`WeightStatistics.share`.
      outside: by part, of embedding, last norm and head.
      layers: of each layer by part.
    """

    thresholds: tuple[float, ...]
    outside: dict[str, WeightStatistics]
    layers: tuple[dict[str, WeightStatistics], ...]

    @property
    def parts(self) -> dict[str, WeightStatistics]:
        """By part, over the whole model, in the order of ``costs.PARTS``."""
        found: dict[str, WeightStatistics] = {}
        for of_parts in (self.outside, *self.layers):
            for part, statistics in of_parts.items():
                found[part] = found.get(part, WeightStatistics()).merged(statistics)
        return {part: found[part] for part in PARTS if part in found}

    @property
    def whole(self) -> WeightStatistics:
        """Of all weights."""
        whole = WeightStatistics()
        for statistics in self.parts.values():
            whole = whole.merged(statistics)
        return whole


def weight_statistics(config: ByteConfig, params: Params, thresholds: tuple[float, ...] = THRESHOLDS) -> Statistics:
    """Reads every weight once, one leaf on the host at a time. Rows that pad the vocabulary are left out.

    Args:
      config: of the model.
      params: its weights, numpy or jax arrays.
      thresholds: magnitudes below which weights are counted.

    Raises:
      ConfigError: a threshold is not positive.
    """
    require(all(t > 0 for t in thresholds), f"thresholds are magnitudes and must be positive, got {thresholds}")
    outside: dict[str, WeightStatistics] = {}
    layers: tuple[dict[str, WeightStatistics], ...] = tuple({} for _ in config.layer_specs)
    for piece in pieces(config, params):
        of_parts = outside if piece.layer is None else layers[piece.layer]
        of_parts.setdefault(piece.part, WeightStatistics()).add(_array(config, piece), thresholds)
    return Statistics(thresholds, outside, layers)


def _array(config: ByteConfig, piece: Piece) -> np.ndarray:
    array = np.asarray(piece.leaf if piece.at is None else piece.leaf[piece.at])
    if piece.part == "embedding":
        return array[: config.vocab_size]
    return array[:, : config.vocab_size] if piece.part == "head" else array

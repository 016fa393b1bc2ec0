"""Sections of the network's settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stellarbyte_jax.config.section import PositiveFloat, Section, Share, Size, SizeOrZero, require, written

# Settings of rotary scaling that only these kinds read.
_SCALING_SETTINGS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("yarn", "llama3"): ("original_max_position_embeddings",),
    ("llama3",): ("low_freq_factor", "high_freq_factor"),
    ("yarn",): ("beta_fast", "beta_slow", "attention_factor"),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Section):
    """Rotary frequencies for more positions than the model was trained with.

    Attributes:
      name: how frequencies change; dynamic goes by the length of each text so far: tokens read before it grew
        past the trained length were rotated by other frequencies, so a cache agrees with a full pass in the
        first layer alone
      factor: how many times longer texts become
      original_max_position_embeddings: positions of the original model (yarn, llama3); none:
        max_position_embeddings
      low_freq_factor: waves longer than original / this are stretched (llama3)
      high_freq_factor: waves shorter than original / this stay (llama3)
      beta_fast: pairs of channels with more rotations over the original length are left as they are (yarn)
      beta_slow: pairs of channels with fewer rotations are stretched (yarn)
      attention_factor: factor of queries and keys (yarn); none: 0.1 ln(factor) + 1
    """

    name: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: PositiveFloat = 1.0
    original_max_position_embeddings: Size | None = None
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None

    def _check(self) -> None:
        require(self.factor >= 1, f"rope_scaling.factor must be at least 1, got {self.factor}")
        require(
            self.name != "none" or not self.given(),
            f"rope_scaling.name is none, but {', '.join(self.given())} is given: name one of linear, dynamic, yarn, "
            "llama3",
        )
        for owners, settings in _SCALING_SETTINGS.items():
            stray = [name for name in settings if name in self.given() and self.name not in owners]
            require(
                not stray,
                f"rope_scaling.{', '.join(stray)} belongs to {' and '.join(owners)}, the name is {self.name}",
            )
        require(
            self.name in ("none", "dynamic") or self.factor > 1 or self.attention_factor is not None,
            f"rope_scaling.name={self.name} with factor 1 changes nothing: give rope_scaling.factor, or leave both out",
        )
        require(
            self.beta_fast > self.beta_slow,
            f"rope_scaling.beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}",
        )
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"rope_scaling.high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
            f"{self.low_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Section):
    """Segment memory: states of earlier tokens that a layer attends to, carried from segment to segment.

    Dai et al. 2019, https://arxiv.org/abs/1901.02860.

    Attributes:
      length: tokens before a token that each layer remembers and attends to; a list gives each layer its own;
        0: no memory
      recent_share: share of the slots for the newest states; the others hold compressed older ones
      compression_weight: weight of a compressed slot's old content when older states are added to it
      batch_policy: what happens when the number of rows changes: an error, the first rows stay, or the rows are
        repeated
    """

    length: SizeOrZero | tuple[SizeOrZero, ...] = 0
    recent_share: Share = 1.0
    compression_weight: Share = 0.7
    batch_policy: Literal["strict", "select", "repeat"] = "strict"


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Section):
    """The key/value cache of generation.

    Attributes:
      dtype: type of cached keys and values; 8 bits take half the memory of bfloat16; compute: that of
        compute_dtype
      heavy_hitters: keys to keep that got most attention, while other old ones are dropped; none: all are kept
      recent: with heavy_hitters: number of newest keys, which always stay
    """

    dtype: Literal["compute", "float32", "bfloat16", "int8", "float8_e4m3fn"] = "compute"
    heavy_hitters: SizeOrZero | None = None
    recent: Size | None = None

    def _check(self) -> None:
        require(
            (self.heavy_hitters is None) == (self.recent is None),
            f"cache.heavy_hitters and cache.recent belong together, got {written(self.heavy_hitters)} and "
            f"{written(self.recent)}",
        )

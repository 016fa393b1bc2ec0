"""What ``benchmark decode_attention`` measures: attention of a token over a cache, by rows, keys and dtype.

What counts is how many bytes of keys, values and scales are read in a second, beside what the memory allows.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stellarbyte_jax.cli.measurements import tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import ConfigError, TrainConfig

Result = dict[str, Any]
WAYS = ("pallas", "auto")
CALLS = 10  # of a repeat
LEAST = 1 << 28  # bytes that a call reads at least: five times what stays in an H100's cache


class Case(NamedTuple):
    """A cache that is attended to.

    Attributes:
      rows: B.
      keys: S, that each row has.
      dtype: of the cache.
      heads: N.
      kv_heads: K.
      size: H.
      least: bytes that a call reads at least.
    """

    rows: int
    keys: int
    dtype: str
    heads: int = 32
    kv_heads: int = 8
    size: int = 64
    least: int = LEAST

    @property
    def bytes(self) -> int:
        """Of keys, values and scales of a layer."""
        each = 2 * self.size if self.dtype == "bfloat16" else self.size + 4
        return 2 * self.rows * self.keys * self.kv_heads * each

    @property
    def layers(self) -> int:
        """Of a call."""
        return max(2, -(-self.least // self.bytes))


_DTYPES = {"bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
_OF_ROWS = {
    rows: {
        **{f"{keys}_{short}": Case(rows, keys, dtype) for keys in (2048, 16384) for short, dtype in _DTYPES.items()},
        "2048_bf16_size_128": Case(rows, 2048, "bfloat16", size=128),
        "512_bf16": Case(rows, 512, "bfloat16"),
    }
    for rows in (1, 32)
}
ON_GPU = {f"decode_batch_{rows}": cases for rows, cases in _OF_ROWS.items()}
# Without a GPU: whether everything runs.
SMALL = {"small_decode": {name: Case(2, 128, name, 4, 2, least=0) for name in ("bfloat16", "int8", "float8_e4m3fn")}}
CASES = ON_GPU | SMALL
NAMES = tuple(ON_GPU)


def bandwidth_of(device: str) -> float | None:
    """Bytes a second of a device's memory, by its name; None where that is not known."""
    with imports():
        from stellarbyte_jax.training.plan_devices import device_of
    try:
        return device_of(device).bandwidth
    except ConfigError:  # not known, or a card of the same name with other memory
        return None


def figures(case: Case, seconds: Sequence[float], bandwidth: float | None) -> Result:
    """What is told of a way.

    Args:
      case: that it computed.
      seconds: of a layer, by repeat.
      bandwidth: of the memory; None where it is not known.
    """
    median = statistics.median(seconds)
    return {
        "microseconds": round(1e6 * median, 2),
        "lowest": round(1e6 * min(seconds), 2),
        "highest": round(1e6 * max(seconds), 2),
        "gigabytes_per_second": float(f"{case.bytes / median / 1e9:.4g}"),
        **({} if bandwidth is None else {"of_bandwidth": round(case.bytes / median / bandwidth, 4)}),
        "repeats": len(seconds),
    }


def _ours(name: str) -> Callable[[TrainConfig, int | None], Result]:
    def measure(config: TrainConfig, steps: int | None, profile: Any = None) -> Result:
        del config, profile
        with imports():
            from stellarbyte_jax.cli.decode_ours import measure_case
            from stellarbyte_jax.launch import environment
        found: Result = {}
        for label, case in CASES[name].items():
            tell(f"{label}: {case}, {case.layers} layers")
            found[label] = measure_case(case, WAYS, steps or CALLS)
        errors = [result["error"] for result in found.values() if "error" in result]
        return {**found, **({"error": errors[0]} if errors else {}), "on": environment()}

    return measure


WORKERS = {name: _ours(name) for name in CASES}

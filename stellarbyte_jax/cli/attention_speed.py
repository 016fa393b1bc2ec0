"""What ``benchmark attention`` measures: attention and its gradients by mask, in bfloat16, by each implementation.

FLOPs are 4 H for each pair of a query and a key that it sees, 2.5 times as many for the gradients.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stellarbyte_jax.cli.measurements import tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.launch.hardware import hardware_of

Result = dict[str, Any]
WAYS = ("pallas", "cudnn", "xla", "reference")
CALLS = 20  # of a repeat
BACKWARD = 2.5  # times the forward FLOPs


class Case(NamedTuple):
    """Attention to be measured.

    Attributes:
      rows: B.
      length: S, of queries and keys.
      heads: N.
      kv_heads: K.
      size: H.
      document: mean tokens of a document; None for one document a row.
      window: keys that a query sees; None for all.
      sinks: first tokens of a document, which no window hides.
      softcap: of the scores.
    """

    rows: int
    length: int
    heads: int
    kv_heads: int
    size: int
    document: int | None = None
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None


_ON_GPU = {
    "causal_64": Case(8, 4096, 16, 4, 64),
    "causal_128": Case(8, 4096, 16, 4, 128),
    "causal_128_long": Case(4, 8192, 16, 4, 128),
    "packed_128": Case(4, 8192, 16, 4, 128, document=1024),
    "packed_64": Case(8, 4096, 16, 4, 64, document=512),
    "window_128": Case(4, 8192, 16, 4, 128, window=1024),
    "sinks_128": Case(4, 8192, 16, 4, 128, window=1024, sinks=4),
    "softcap_128": Case(2, 4096, 16, 4, 128, softcap=50.0),
}
# Without a GPU: whether everything runs.
SMALL = {"small_attention": Case(1, 256, 2, 1, 64, document=64, window=48, sinks=2)}
CASES = _ON_GPU | SMALL
NAMES = tuple(_ON_GPU)
PEERS = tuple(f"torch_{name}" for name in NAMES)


def documents(case: Case) -> Any:
    """int32 [B, S]: the document of each token, from 0 on; their lengths are drawn exponentially."""
    with imports():
        import numpy as np

    ids = np.zeros((case.rows, case.length), np.int32)
    if case.document is not None:
        random = np.random.default_rng(0)
        for row in ids:
            lengths = 1 + random.exponential(case.document, 2 * case.length // case.document + 8).astype(np.int64)
            starts = np.cumsum(lengths)
            row[:] = np.searchsorted(starts, np.arange(case.length), side="right")
    return ids


def firsts(ids: Any) -> Any:
    """int32 [B, S]: the first token of each one's document."""
    with imports():
        import numpy as np

    places = np.arange(ids.shape[1], dtype=np.int32)[None]
    begins = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def pairs(case: Case) -> int:
    """Pairs of a query and a key that it sees, of all rows and one head."""
    with imports():
        import numpy as np

    first = firsts(documents(case)).astype(np.int64)
    place = np.arange(case.length)[None]
    near = first if case.window is None else np.maximum(first, place - case.window + 1)
    hidden = np.minimum(near - first, case.sinks) if case.window is not None else 0
    return int(np.sum(place - near + 1 + hidden))


def figures(case: Case, forward: Sequence[float], both: Sequence[float], device: str) -> Result:
    """What is told of a way.

    Args:
      case: that it computed.
      forward: seconds of attention alone, by repeat.
      both: of attention with its gradients.
      device: its name, by which its peak is known.
    """
    flops = 4.0 * case.heads * case.size * pairs(case)
    ahead, whole = statistics.median(forward), statistics.median(both)
    backward = whole - ahead
    peak = hardware_of(device)
    rates = {"forward": flops / ahead, "backward": BACKWARD * flops / backward, "both": (1 + BACKWARD) * flops / whole}
    return {
        **{f"{name}_tflops": float(f"{rate / 1e12:.4g}") for name, rate in rates.items()},
        "forward_ms": round(1e3 * ahead, 3),
        "backward_ms": round(1e3 * backward, 3),
        "lowest_both_ms": round(1e3 * min(both), 3),
        "highest_both_ms": round(1e3 * max(both), 3),
        **({} if peak is None else {"of_peak": round(rates["both"] / peak.bfloat16_flops, 4)}),
        "repeats": len(both),
    }


def _ours(name: str) -> Callable[[TrainConfig, int | None], Result]:
    def measure(config: TrainConfig, steps: int | None, profile: Any = None) -> Result:
        del config, profile
        with imports():
            from stellarbyte_jax.cli.attention_ours import measure_case
        tell(f"{name}: {CASES[name]}")
        return measure_case(CASES[name], WAYS, steps or CALLS)

    return measure


WORKERS = {name: _ours(name) for name in CASES}

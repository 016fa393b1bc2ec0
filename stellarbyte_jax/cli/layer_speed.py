"""What ``benchmark moe_layer`` measures: one layer with experts, its router and its sums included, in bfloat16.

Shapes are those of a model of 7B parameters in the paper of SonicMoE (Guo et al. 2025,
https://arxiv.org/abs/2512.14080), whose published figures are of an H100 too.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from stellarbyte_jax.cli.measurements import REPEATS, tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.launch.hardware import hardware_of

Result = dict[str, Any]


class Layer(NamedTuple):
    """A shape.

    Attributes:
      tokens: of a call.
      hidden: D.
      inside: n, of an expert.
      experts: E.
      choices: of a token.
    """

    tokens: int
    hidden: int
    inside: int
    experts: int
    choices: int

    @property
    def flops(self) -> float:
        """Of the products of experts, forward; twice as many backward."""
        return 6.0 * self.tokens * self.choices * self.hidden * self.inside


_ON_GPU = {
    "n256": Layer(24576, 1536, 256, 128, 8),
    "n512": Layer(24576, 1536, 512, 64, 4),
    "n1024": Layer(24576, 1536, 1024, 32, 2),
}
NAMES = tuple(_ON_GPU)
SMALL = {"small": Layer(256, 64, 64, 4, 2)}  # without a GPU: whether everything runs
SHAPES = _ON_GPU | SMALL
_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "intermediate_size")
OF_SHAPES = ("model.hidden_size", "model.num_hidden_layers", *(f"model.moe.{name}" for name in _OF_EXPERTS))  # settings
PEERS = tuple(f"huggingface_{name}" for name in NAMES)


def figures(shape: Layer, forward: list[float], both: list[float], device: str) -> Result:
    """What is told of a layer.

    Args:
      shape: of it.
      forward: seconds of a forward pass that keeps what the backward pass needs, by repeat.
      both: of both passes.
      device: its name, by which its peak is known.

    Returns:
      Milliseconds and TFLOP/s of the forward pass, of both, and of the backward pass by the difference of the medians.
    """
    ahead, whole = statistics.median(forward), statistics.median(both)
    seconds = {"forward": ahead, "backward": whole - ahead, "both": whole}
    rates = {
        name: factor * shape.flops / seconds[name] for name, factor in (("forward", 1), ("backward", 2), ("both", 3))
    }
    peak = hardware_of(device)
    return {
        **{f"{name}_tflops": round(rate / 1e12, 1) for name, rate in rates.items()},
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in seconds.items()},
        "lowest_both_ms": round(1e3 * min(both), 3),
        "highest_both_ms": round(1e3 * max(both), 3),
        **({} if peak is None else {"of_peak": round(rates["both"] / peak.bfloat16_flops, 4)}),
        "repeats": len(both),
    }


def timed(run: Callable[[int], None], calls: int) -> list[float]:
    """Seconds of a call, by repeat; ``run(n)`` returns when ``n`` calls are done."""
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(calls)
        found.append((time.perf_counter() - start) / calls)
    return found


def _ours(name: str) -> Callable[[TrainConfig, int], Result]:
    def measure(config: TrainConfig, steps: int, profile: Any = None) -> Result:
        del profile
        with imports():
            from stellarbyte_jax.cli.layer_ours import measure_layer
        shape = SHAPES[name]
        numbers = (shape.experts, shape.choices, shape.inside)
        moe = replace(config.model.moe, **dict(zip(_OF_EXPERTS, numbers, strict=True)))
        model = replace(config.model, hidden_size=shape.hidden, num_hidden_layers=1, moe=moe)
        tell(f"{name}: {shape}")
        return measure_layer(model, shape, steps)

    return measure


WORKERS = {name: _ours(name) for name in SHAPES}

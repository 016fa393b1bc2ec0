"""What ``benchmark cross_entropy`` measures: the head and its loss with their gradients, in bfloat16.

X tokens, D model, V vocabulary. FLOPs are 6 X D V: 2 for logits, 4 for both gradients, nothing that is computed again.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stellarbyte_jax.cli.layer_speed import timed
from stellarbyte_jax.cli.measurements import tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.launch.hardware import hardware_of

Result = dict[str, Any]
CALLS = 5  # of a repeat
CHUNKS = (1024, 4096, 16384)  # tokens whose logits exist at a time
_LIGER = "liger_kernel"  # of the package liger-kernel


class Case(NamedTuple):
    """A head and the tokens before it.

    Attributes:
      tokens: X.
      hidden: D.
      vocabulary: V.
    """

    tokens: int
    hidden: int
    vocabulary: int


_ON_GPU = {
    "loss_16k_32k": Case(16384, 1024, 32000),
    "loss_32k_128k": Case(32768, 2048, 131072),
    "loss_32k_128k_wide": Case(32768, 4096, 131072),
    "loss_32k_256k": Case(32768, 2048, 262144),
}
SMALL = {"small_loss": Case(128, 64, 512)}  # without a GPU: whether everything runs
CASES = _ON_GPU | SMALL
NAMES = tuple(_ON_GPU)
PEERS = tuple(f"torch_{name}" for name in NAMES)


def figures(case: Case, seconds: Sequence[float], extra: float, device: str) -> Result:
    """What is told of a way.

    Args:
      case: that it computed.
      seconds: of a call, by repeat.
      extra: bytes beside arguments and results.
      device: its name, by which its peak is known.
    """
    flops = 6.0 * case.tokens * case.hidden * case.vocabulary
    median, peak = statistics.median(seconds), hardware_of(device)
    return {
        "tflops": float(f"{flops / median / 1e12:.4g}"),
        "ms": round(1e3 * median, 2),
        "lowest_ms": round(1e3 * min(seconds), 2),
        "highest_ms": round(1e3 * max(seconds), 2),
        "extra_gib": round(extra / 2**30, 3),
        **({} if peak is None else {"of_peak": round(flops / median / peak.bfloat16_flops, 4)}),
        "repeats": len(seconds),
    }


def _ours(name: str) -> Callable[[TrainConfig, int | None], Result]:
    def measure(config: TrainConfig, steps: int | None, profile: Any = None) -> Result:
        del config, profile
        with imports():
            from stellarbyte_jax.cli.loss_ours import measure_case
        tell(f"{name}: {CASES[name]}")
        return measure_case(CASES[name], [min(chunk, CASES[name].tokens) for chunk in CHUNKS], steps or CALLS)

    return measure


def _peer(name: str) -> Callable[[TrainConfig, int | None], Result]:
    def measure(config: TrainConfig, steps: int | None) -> Result:
        del config
        with imports():
            import torch

        if not torch.cuda.is_available():
            return {"error": "the peer of this measurement needs a GPU"}
        return _measured(torch, CASES[name], steps or CALLS)

    return measure


def _measured(torch: Any, case: Case, calls: int) -> Result:
    """Liger's fused loss, and torch's own compiled, which has all logits at once."""
    torch.manual_seed(0)
    made = {"device": "cuda", "dtype": torch.bfloat16}
    x_XD = torch.randn(case.tokens, case.hidden, **made).requires_grad_()
    head_VD = (0.02 * torch.randn(case.vocabulary, case.hidden, **made)).requires_grad_()
    targets_X = torch.randint(0, case.vocabulary, (case.tokens,), device="cuda")

    def own(x: Any, head: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy((x @ head.T).float(), targets)

    ways: dict[str, Callable[..., Any]] = {"compiled": torch.compile(own)}
    try:
        import importlib

        functional = importlib.import_module(f"{_LIGER}.transformers.functional")
        ways = {"liger": lambda x, head, targets: functional.liger_fused_linear_cross_entropy(x, head, targets), **ways}
    except ImportError as error:
        tell(f"no liger-kernel: {error}")
    found: Result = {}
    for way, loss in ways.items():

        def run(count: int, loss: Callable[..., Any] = loss) -> None:
            for _ in range(count):
                torch.autograd.grad(first_of(loss(x_XD, head_VD, targets_X)), (x_XD, head_VD))
            torch.cuda.synchronize()

        try:
            run(2)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(1)
            results = 2 * (x_XD.numel() + head_VD.numel())
            extra = torch.cuda.max_memory_allocated() - before - results
            found[way] = figures(case, timed(run, calls), extra, torch.cuda.get_device_name())
        except RuntimeError as error:  # too large, or not supported
            found[way] = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            torch.cuda.empty_cache()
    return {**found, "on": f"torch {torch.__version__}, {torch.cuda.get_device_name()}"}


def first_of(found: Any) -> Any:
    """The loss, of functions that return more."""
    return found[0] if isinstance(found, tuple) else found


WORKERS = {name: _ours(name) for name in CASES}
LOSS_PEERS = {peer: _peer(peer.removeprefix("torch_")) for peer in PEERS}

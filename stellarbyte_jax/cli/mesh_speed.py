"""What ``benchmark mesh`` measures: each axis of a mesh over all devices, one device beside it, and a peer on torch.

A row is a model and a mesh, written as settings of a config that comes with the package. Its parts are ``single``, the
same on one device, all devices, and ``peer``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stellarbyte_jax.cli.measurements import fastest
from stellarbyte_jax.cli.workers import OUT_OF_MEMORY

Result = dict[str, Any]
# (worker, name of the part, row, settings, processes) -> what it measured
Run = Callable[[str, str, "Row", Sequence[str], int], Result]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
      axes: of the mesh: two devices over each but the first, which has the others.
      config: name of a config that comes with the package.
      settings: that change it.
      rows: of a batch, for each device with rows of its own: those of ``tensor`` and ``context`` share theirs.
      single: the same is measured on one device; False: most have no room for it.
      peer: worker that measures one; None: none.
      peers: settings with which the peer is measured in turn, the fastest one counts; it has those of the row besides.
      target: times as fast as one device, on two; None: not said.
      least: devices that its models are for.
      steps: of a repeat, of a second or more in all: starting the first one is no part of training.
    """

    axes: tuple[str, ...]
    config: str
    settings: tuple[str, ...]
    rows: int
    single: bool = True
    peer: str | None = None
    peers: tuple[tuple[str, ...], ...] = ((),)
    target: float | None = None
    least: int = 2
    steps: int = 5

    def sizes(self, devices: int) -> dict[str, int]:
        """The mesh on so many devices."""
        others = dict.fromkeys(self.axes[1:], 2)
        return {self.axes[0]: devices // math.prod(others.values()), **others}

    def typed(self, devices: int) -> list[str]:
        """All settings on so many devices; one has no mesh."""
        sizes = dict.fromkeys(self.axes, 1) if devices == 1 else self.sizes(devices)
        batch = self.rows * math.prod(size for axis, size in sizes.items() if axis not in ("tensor", "context"))
        mesh = [f"mesh.{axis}={size}" for axis, size in {"data": 1, **sizes}.items()]
        return [*self.settings, f"global_batch_size={batch}", *mesh]


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, length: int) -> tuple[str, ...]:
    return (
        f"model.hidden_size={hidden}",
        f"model.num_hidden_layers={layers}",
        f"model.num_attention_heads={heads}",
        f"model.num_key_value_heads={kv_heads}",
        f"model.intermediate_size={mlp}",
        f"model.max_position_embeddings={length}",
        f"data.sequence_length={length}",
    )


# Llama 2 7B (Touvron et al. 2023, https://arxiv.org/abs/2307.09288) with the vocabulary of the package.
_LLAMA_2 = _shape(4096, 32, 32, 32, 11008, 2048)
# Llama 3 8B (Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783).
_LLAMA_3 = (*_shape(4096, 32, 32, 8, 14336, 4096), "model.vocab_size=128256", "model.tie_word_embeddings=false")


def _qwen_3(layers: int) -> tuple[str, ...]:
    """Qwen3-30B-A3B (Yang et al. 2025, https://arxiv.org/abs/2505.09388) with so many of its 48 layers."""
    experts = ("model.moe.num_experts=128", "model.moe.intermediate_size=768", "model.head_dim=128")
    head = ("model.vocab_size=151936", "model.tie_word_embeddings=false")
    return (*_shape(2048, layers, 32, 4, 6144, 2048), *experts, *head)


DENSE = _shape(2048, 16, 32, 8, 8192, 2048)  # 1.10B parameters
_LESS_MEMORY = ("model.remat=full", "model.scan_unroll=1")
_SHARDED: dict[str, Any] = {"axes": ("fsdp",), "config": "pretrain", "single": False}
_PEER: dict[str, Any] = {"least": 4, "peer": "huggingface_fsdp2", "peers": ((), ("model.remat=full",))}
_EXPERTS: dict[str, Any] = {"config": "pretrain_moe", "steps": 10}
_LARGE_EXPERTS = {**_EXPERTS, "rows": 4, "single": False, "least": 4, "steps": 5}
_QWEN_3 = {"30.5B, 3.4B active": 48, "23.1B, 2.7B active": 36, "15.6B, 2.0B active": 24, "8.1B, 1.3B active": 12}
ROWS: dict[str, dict[str, Row]] = {
    "fsdp": {"1.10B": Row(("fsdp",), "pretrain", DENSE, 8, peer="huggingface_fsdp2", target=1.92)},
    "data": {"162M": Row(("data",), "pretrain", (), 32, peer="huggingface_ddp", target=1.92, steps=20)},
    "tensor": {"1.10B": Row(("tensor",), "pretrain", DENSE, 8, target=1.6)},
    "expert": {"1.3B, 220M active": Row(("expert",), settings=(), rows=8, target=1.8, **_EXPERTS)},
    "context": {"355M": Row(("context",), "pretrain", _shape(1024, 24, 16, 4, 3072, 32768), 1, target=1.7)},
    "large": {
        "6.74B": Row(settings=(*_LLAMA_2, *_LESS_MEMORY), rows=4, **_SHARDED),
        "6.74B, a row a device": Row(settings=(*_LLAMA_2, *_LESS_MEMORY), rows=1, **_SHARDED),
        "3.01B": Row(settings=(*_shape(3072, 28, 24, 8, 8192, 2048), *_LESS_MEMORY), rows=4, **_SHARDED),
        "1.10B": Row(settings=(*DENSE, *_LESS_MEMORY), rows=4, **_SHARDED),
    },
    "tensor_fsdp": {"1.10B": Row(("fsdp", "tensor"), "pretrain", DENSE, 8)},
    "expert_fsdp": {"1.3B, 220M active": Row(("fsdp", "expert"), settings=(), rows=8, **_EXPERTS)},
    "context_fsdp": {"355M": Row(("context", "fsdp"), "pretrain", _shape(1024, 24, 16, 4, 3072, 65536), 1)},
    "llama": {
        "8.03B": Row(settings=_LLAMA_3, rows=2, **_PEER, **_SHARDED),
        "8.03B, weights gathered again": Row(settings=(*_LLAMA_3, "model.remat=weights"), rows=2, **_PEER, **_SHARDED),
        "8.03B, all made again": Row(settings=(*_LLAMA_3, *_LESS_MEMORY), rows=2, **_PEER, **_SHARDED),
    },
    "large_expert": {name: Row(("expert",), settings=_qwen_3(n), **_LARGE_EXPERTS) for name, n in _QWEN_3.items()},
    "large_expert_fsdp": {
        name: Row(("fsdp", "expert"), settings=_qwen_3(n), **_LARGE_EXPERTS) for name, n in _QWEN_3.items()
    },
}
# Without GPUs: whether everything runs. Nothing follows from the figures, devices of a CPU share its cores.
TINY = ("optimizer.name=adamw", "optimizer.learning_rate=6e-4", *_shape(128, 2, 8, 8, 256, 64))


def _small(row: Row) -> Row:
    config = {"pretrain": "quickstart", "pretrain_moe": "quickstart_moe"}[row.config]
    less_memory = tuple(setting for setting in row.settings if setting.startswith(("model.remat=", "model.scan_")))
    return replace(row, config=config, settings=(*TINY, *less_memory), rows=min(row.rows, 2), target=None)


NAMES = tuple(ROWS)
COMPARED = ("model", "tokens_per_second", "tokens_per_second_per_device", "speedup", "target", "times_the_peer")


def rows(name: str, small: bool) -> dict[str, Row]:
    """The models of a row, of which the first that fits is measured."""
    return {"tiny": _small(next(iter(ROWS[name].values())))} if small else ROWS[name]


def least_devices(name: str) -> int:
    """Fewer have no such mesh, or too little memory for the models that the row is about."""
    row = next(iter(ROWS[name].values()))
    return max(row.least, 2 ** len(row.axes))


def measure(name: str, devices: int, small: bool, peers: bool, run: Run) -> Iterator[Result]:
    """Measures a row part after part.

    Args:
      name: one of :data:`NAMES`.
      devices: of the machine, at least :func:`least_devices`.
      small: there is no GPU: tiny models.
      peers: they are measured too.
      run: measures one part.

    Yields:
      What is known after each part: figures of all devices, with ``single`` and ``peer`` inside.
    """
    models = rows(name, small)
    row, parts = next(iter(models.values())), Result()
    if row.single:
        single = run("synthetic", f"{name}_single", row, row.typed(1), 1)
        parts["single"] = {**single, "devices": 1, "settings": row.typed(1)}
        yield parts
    row, measured = _first_that_fits(name, models, devices, run)
    parts = {**measured, **parts}
    target = row.target if devices == 2 else None
    yield _compared(parts, target)
    if peers and row.peer is not None:
        parts["peer"] = _fastest_peer(name, row, devices, run)
        yield _compared(parts, target)


def _first_that_fits(name: str, models: Mapping[str, Row], devices: int, run: Run) -> tuple[Row, Result]:
    """The first model that can be measured, and why those before it could not."""
    failed: dict[str, str] = {}
    for model, row in models.items():
        settings = row.typed(devices)
        found = run("synthetic", name, row, settings, 1)
        if "error" not in found:
            told = {"mesh": row.sizes(devices), "config": row.config, "settings": settings}
            return row, {"model": model, **found, **told, **({"failed": failed} if failed else {})}
        failed[model] = found["error"]
        what = "does not fit" if found["error"] == OUT_OF_MEMORY else "could not be measured"
        print(f"{name:14} {model} {what}: {found['error']}", flush=True)
    return next(iter(models.values())), {"error": f"none of {', '.join(failed)} could be measured", "failed": failed}


def _fastest_peer(name: str, row: Row, devices: int, run: Run) -> Result:
    """The fastest of the ways in which the peer is measured; the others stand beside it."""
    found: dict[str, Result] = {}
    for changes in row.peers:
        part = " ".join((f"{name}_peer", *changes))
        found[part] = run(str(row.peer), part, row, [*row.typed(devices), *changes], devices)
        if changes:
            found[part]["changes"] = list(changes)
    return fastest([*found.values()])


def _compared(parts: Result, target: float | None) -> Result:
    """Adds rates of a device, and how many times as fast all devices are as one device, and as the peer."""
    result = dict(parts)
    if "tokens_per_second" not in parts:
        return result
    rate = parts["tokens_per_second"]
    result["tokens_per_second_per_device"] = round(rate / parts["devices"])
    single, peer = parts.get("single", {}), parts.get("peer", {})
    if "tokens_per_second" in single:
        result["speedup"] = round(rate / single["tokens_per_second"], 3)
        result |= {} if target is None else {"target": target}
    if "tokens_per_second" in peer:
        of_peer = peer["tokens_per_second"]
        utilisation = {"mfu": round(parts["mfu"] * of_peer / rate, 4)} if "mfu" in parts else {}
        result["peer"] = {**peer, "tokens_per_second_per_device": round(of_peer / parts["devices"]), **utilisation}
        result["times_the_peer"] = round(rate / of_peer, 3)
    return result


def has_failed(result: Result) -> bool:
    """Whether a measurement, or a part of it, has no figures."""
    return "error" in result or any(has_failed(part) for part in result.values() if isinstance(part, dict))

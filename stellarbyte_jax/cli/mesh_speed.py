"""What ``benchmark mesh`` measures: each axis of a mesh over all devices, one device beside it, and a peer on torch.

A row is a model and a mesh, written as settings of a config that comes with the package. Its parts are ``single``, the
same on one device, all devices, and ``peer``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.cli.workers import OUT_OF_MEMORY

Result = dict[str, Any]
# (worker, name of the part, row, settings, processes) -> what it measured
Run = Callable[[str, str, "Row", Sequence[str], int], Result]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
      axis: of the mesh, over all devices.
      config: name of a config that comes with the package.
      settings: that change it.
      rows: of a batch; of each device where ``scaled``, else of all together.
      scaled: the batch grows with the devices: else they share the work of one.
      peer: worker that measures one; None: none.
      target: times as fast as one device, on two; None: not said.
      steps: of a repeat, of a second or more in all: starting the first one is no part of training.
    """

    axis: str
    config: str
    settings: tuple[str, ...]
    rows: int
    scaled: bool = True
    peer: str | None = None
    target: float | None = None
    steps: int = 5

    def typed(self, devices: int) -> list[str]:
        """All settings on so many devices."""
        mesh = (
            [f"mesh.{self.axis}={devices}"] if self.axis == "data" else ["mesh.data=1", f"mesh.{self.axis}={devices}"]
        )
        return [*self.settings, f"global_batch_size={self.rows * (devices if self.scaled else 1)}", *mesh]


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


_DENSE = _shape(2048, 16, 32, 8, 8192, 2048)  # 1.10B parameters
_LESS_MEMORY = ("model.remat=full", "model.scan_unroll=1")
ROWS = {
    "fsdp": Row("fsdp", "pretrain", _DENSE, 8, peer="huggingface_fsdp2", target=1.92),
    "data": Row("data", "pretrain", (), 32, peer="huggingface_ddp", target=1.92, steps=20),
    "tensor": Row("tensor", "pretrain", _DENSE, 8, scaled=False, target=1.6),
    "expert": Row("expert", "pretrain_moe", (), 8, target=1.8, steps=10),
    "context": Row("context", "pretrain", _shape(1024, 24, 16, 4, 3072, 32768), 1, scaled=False, target=1.7),
}
# The first that fits is measured: Llama 2 (Touvron et al. 2023, https://arxiv.org/abs/2307.09288), and smaller ones.
LARGE = {
    "6.74B": Row("fsdp", "pretrain", (*_shape(4096, 32, 32, 32, 11008, 2048), *_LESS_MEMORY), 4),
    "6.74B, a row a device": Row("fsdp", "pretrain", (*_shape(4096, 32, 32, 32, 11008, 2048), *_LESS_MEMORY), 1),
    "3.01B": Row("fsdp", "pretrain", (*_shape(3072, 28, 24, 8, 8192, 2048), *_LESS_MEMORY), 4),
    "1.10B": Row("fsdp", "pretrain", (*_DENSE, *_LESS_MEMORY), 4),
}
# Without GPUs: whether everything runs. Nothing follows from the figures, devices of a CPU share its cores.
_TINY = ("optimizer.name=adamw", "optimizer.learning_rate=6e-4", *_shape(128, 2, 8, 8, 256, 64))
SMALL_ROWS = {
    "fsdp": Row("fsdp", "quickstart", _TINY, 2, peer="huggingface_fsdp2"),
    "data": Row("data", "quickstart", _TINY, 2, peer="huggingface_ddp"),
    "tensor": Row("tensor", "quickstart", _TINY, 2, scaled=False),
    "expert": Row("expert", "quickstart_moe", _TINY, 2),
    "context": Row("context", "quickstart", _TINY, 1, scaled=False),
}
SMALL_LARGE = {"tiny": Row("fsdp", "quickstart", (*_TINY, *_LESS_MEMORY), 2)}
NAMES = (*ROWS, "large")
COMPARED = ("model", "tokens_per_second", "tokens_per_second_per_device", "speedup", "target", "times_the_peer")


def rows(name: str, small: bool) -> tuple[Row, ...]:
    """The row of this name, or those of which ``large`` takes the first that fits."""
    if name == "large":
        return tuple((SMALL_LARGE if small else LARGE).values())
    return ((SMALL_ROWS if small else ROWS)[name],)


def measure(name: str, devices: int, small: bool, peers: bool, run: Run) -> Iterator[Result]:
    """Measures a row part after part.

    Args:
      name: one of :data:`NAMES`.
      devices: of the machine, at least two.
      small: there is no GPU: tiny models.
      peers: they are measured too.
      run: measures one part.

    Yields:
      What is known after each part: figures of all devices, with ``single`` and ``peer`` inside.
    """
    if name == "large":
        yield _largest(SMALL_LARGE if small else LARGE, devices, run)
        return
    (row,) = rows(name, small)
    single = run("synthetic", f"{name}_single", row, row.typed(1), 1)
    parts: Result = {"single": {**single, "devices": 1, "settings": row.typed(1)}}
    yield parts
    parts = {**_on_all(name, row, devices, run), **parts}
    yield _compared(parts, row.target if devices == 2 else None)
    if peers and row.peer is not None:
        parts["peer"] = run(row.peer, f"{name}_peer", row, row.typed(devices), devices)
        yield _compared(parts, row.target if devices == 2 else None)


def _on_all(name: str, row: Row, devices: int, run: Run) -> Result:
    typed = row.typed(devices)
    measured = run("synthetic", name, row, typed, 1)
    return {**measured, "mesh": {row.axis: devices}, "config": row.config, "settings": typed}


def _largest(candidates: dict[str, Row], devices: int, run: Run) -> Result:
    """The first one that can be measured, and why those before it could not."""
    failed = {}
    for model, row in candidates.items():
        found = _on_all("large", row, devices, run)
        if "error" not in found:
            return _compared({"model": model, **found, **({"failed": failed} if failed else {})}, None)
        failed[model] = found["error"]
        what = "does not fit" if found["error"] == OUT_OF_MEMORY else "could not be measured"
        print(f"{'large':14} {model} {what}: {found['error']}", flush=True)
    return {"error": f"none of {', '.join(candidates)} could be measured", "failed": failed}


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
    return "error" in result or any("error" in part for part in result.values() if isinstance(part, dict))

"""What ``benchmark lora`` measures: fine-tuning by adapters and of all weights, on random tokens and on chats."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.measurements import synthetic, train_ours
from stellarbyte_jax.cli.mesh_speed import DENSE, TINY
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import LoRAConfig, TrainConfig, load

Batch = Mapping[str, Any]  # of numpy, as the loader makes them
BATCHES = 4  # of conversations, taken in turn by both sides
# Of ours, the peers beside it; the fastest counts.
PEERS = {
    "lora": ("lora_peft", "lora_peft_bfloat16"),
    "lora_chats": ("lora_chats_peft", "lora_chats_peft_bfloat16"),
    "sft_chats": ("sft_chats_trainer",),
}
NAMES = tuple(name for ours, peers in PEERS.items() for name in (ours, *peers))
_DOCUMENTS = 64  # of a row at most: 2,048 tokens hold about fifty conversations of the embedded set


def settings(small: bool) -> list[str]:
    """What is set on top of the config: the 1.10B, adapters on all projections, and the chats of configs/sft.py.

    Args:
      small: there is no GPU: a tiny model.
    """
    return [
        *(TINY if small else DENSE),
        f"global_batch_size={2 if small else 8}",
        "mesh.data=1",
        "model.lora.r=16",
        "model.lora.lora_alpha=32",
        f"model.lora.base_dtype={'float32' if small else 'bfloat16'}",
        "data.format=chat",
        f"data.train={json.dumps(load('sft').data.train)}",
        f"data.max_documents_per_sequence={_DOCUMENTS}",
        "data.workers=0",
    ]


def chats(config: TrainConfig) -> tuple[list[Batch], float]:
    """The first batches of packed conversations, and how many of a batch's positions are tokens, on average."""
    with imports():
        from stellarbyte_jax.data.loader import make_loader

    rows, vocabulary = config.global_batch_size, config.model.vocab_size
    with make_loader(config.data, split="train", batch_size=rows, seed=0, vocab_size=vocabulary) as loader:
        batches = list(itertools.islice(loader, BATCHES))
    return batches, sum(int((batch["segment_ids"] > 0).sum()) for batch in batches) / len(batches)


def padding(config: TrainConfig, tokens: float) -> dict[str, float]:
    """The share of positions that hold no token."""
    return {"padding": round(1 - tokens / (config.global_batch_size * config.data.sequence_length), 4)}


def without_adapters(config: TrainConfig) -> TrainConfig:
    """The same network, of which all weights are trained."""
    return replace(config, model=replace(config.model, lora=LoRAConfig()))


def _on_chats(config: TrainConfig, steps: int, profile: Path | None = None) -> dict[str, Any]:
    with imports():
        from stellarbyte_jax.training.placement import mesh_of, on_mesh, place_batches

    batches, tokens = chats(config)
    mesh = mesh_of(config)
    with on_mesh(mesh):
        made = itertools.cycle([*map(place_batches(), batches)])
        return {**train_ours(config, steps, made, mesh.size, profile, tokens), **padding(config, tokens)}


def _sft(config: TrainConfig, steps: int, profile: Path | None = None) -> dict[str, Any]:
    return _on_chats(without_adapters(config), steps, profile)


WORKERS = {"lora": synthetic, "lora_chats": _on_chats, "sft_chats": _sft}

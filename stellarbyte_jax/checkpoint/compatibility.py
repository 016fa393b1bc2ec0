"""Which settings a run may change when it goes on from a checkpoint."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.config import ByteConfig, TrainConfig

_RUNTIME_FIELDS = (
    "compute_dtype",
    "attention_implementation",
    "remat",
    "scan_unroll",
    "attention_dropout",
    "hidden_dropout",
    "residual_dropout",
    "drop_path",
    "initialization",
    "initializer_range",
    "cache",
)
# A run that begins with weights of another one may give them other positions: a longer text, above all.
_POSITION_FIELDS = (
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "layer_types",
    "sink_tokens",
)
# With another value the position in the data would point elsewhere.
_ORDER_FIELDS = (
    "train",
    "tokenizer",
    "fields",
    "template",
    "sequence_length",
    "arrangement",
    "add_bos",
    "add_eos",
    "max_documents_per_sequence",
    "shuffle",
    "on_error",
)


def _architecture(config: ByteConfig) -> dict[str, Any]:
    """What a checkpoint depends on, with derived sizes spelt out."""
    values = {name: value for name, value in config.to_dict().items() if name not in _RUNTIME_FIELDS}
    values["memory"] = {name: value for name, value in values["memory"].items() if name != "batch_policy"}
    derived = {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "layer_types": config.windows,
    }
    return {**values, **derived}


def check_resumable(
    stored: Mapping[str, Any], config: TrainConfig, path: Path, initial: bool, say: Callable[[str], None]
) -> None:
    """Checks that a run with ``config`` may go on from the checkpoint at ``path``.

    Args:
      stored: settings that the checkpoint was written with, as JSON values.
      config: those of now.
      path: for messages.
      initial: whether it holds foreign weights without any training; such a run may have other positions and data.
      say: told what changes.

    Raises:
      CheckpointError: settings differ that must not; the message lists them.
    """
    now = json.loads(config.to_json())
    stored = json.loads(TrainConfig.from_dict(stored).to_json())  # settings that are newer than it have their defaults
    there = _architecture(ByteConfig.from_dict(stored["model"]))
    differ = {
        name: f"model.{name} is {there[name]!r} there and {value!r} here"
        for name, value in _architecture(config.model).items()
        if there[name] != value
    }
    if initial:
        for name in _POSITION_FIELDS:
            if name in differ:
                say(f"the weights in {path} get other positions: {differ.pop(name)}")
    if differ:
        raise CheckpointError(
            f"{path} holds another model: {'; '.join(differ.values())}. Use the same settings, or another output_dir"
        )
    if initial:
        return
    differ = [
        f"data.{name} was {stored['data'].get(name)!r} and is {now['data'][name]!r}"
        for name in _ORDER_FIELDS
        if stored["data"].get(name) != now["data"][name]
    ]
    differ += [
        f"{name} was {stored[name]!r} and is {now[name]!r}"
        for name in ("seed", "global_batch_size")
        if stored[name] != now[name]
    ]
    if stored["optimizer"]["name"] != now["optimizer"]["name"]:
        differ.append(f"optimizer.name was {stored['optimizer']['name']!r} and is {now['optimizer']['name']!r}")
    clips = [c["optimizer"]["gradient_clip_norm"] for c in (stored, now)]
    if (clips[0] is None) != (clips[1] is None):
        differ.append(f"optimizer.gradient_clip_norm was {clips[0]} and is {clips[1]}")
    if (stored["ema_decay"] is None) != (now["ema_decay"] is None):
        differ.append(f"ema_decay was {stored['ema_decay']} and is {now['ema_decay']}")
    if differ:
        raise CheckpointError(
            f"{path} cannot be continued with these settings: {'; '.join(differ)}. "
            "Use the same ones, or another output_dir"
        )

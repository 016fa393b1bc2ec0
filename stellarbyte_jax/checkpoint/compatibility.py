"""Which settings a run may change when it goes on from a checkpoint."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import Any

from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.config import ByteConfig, DataConfig, RopeScaling, TrainConfig
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.data.sources import TEXT_SUFFIX, DataError, expand
from stellarbyte_jax.data.text import TextFormat

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
    "text_documents",
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


def _architecture(config: ByteConfig) -> dict[str, tuple[Any, Any]]:
    """What a checkpoint depends on: by setting what it means, and how it is shown, with derived sizes spelt out."""
    spelt = {name: value for name, value in config.to_dict().items() if name not in _RUNTIME_FIELDS}
    windows = _windows(config)
    sizes = {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "layer_types": windows,
    }
    meanings = {
        **sizes,
        "vocab_size_multiple": config.padded_vocab_size,
        "sliding_window": windows,
        "sink_tokens": config.sink_tokens if any(windows) else 0,  # what no window hides needs no exception
        "rope_scaling": _scaling(config),
        "memory": (config.layer_specs, config.memory.compression_weight),
        "layer_scale_init": config.layer_scale_init is not None,  # how much it is matters to new weights alone
    }
    return {name: (meanings.get(name, value), sizes.get(name, value)) for name, value in spelt.items()}


def _windows(config: ByteConfig) -> tuple[int | None, ...]:
    """The windows that hide something of the longest text; memories, whose own they may be, are compared too."""
    longest = config.max_position_embeddings
    return tuple(None if w is not None and w >= longest else w for w in config.windows)


def _scaling(config: ByteConfig) -> RopeScaling:
    """The rotary scaling with all that its settings leave to be derived."""
    scaling = config.rope_scaling
    if scaling.name in ("yarn", "llama3") and scaling.original_max_position_embeddings is None:
        scaling = replace(scaling, original_max_position_embeddings=config.max_position_embeddings)
    if scaling.name == "yarn" and scaling.attention_factor is None:
        scaling = replace(scaling, attention_factor=0.1 * math.log(scaling.factor) + 1.0)
    return scaling


def _order(name: str, data: DataConfig) -> Any:
    """What a setting of the data means for the order of its tokens."""
    if name == "train":
        return _files(data.train)
    if name == "text_documents":
        return data.text_documents if any(str(file).endswith(TEXT_SUFFIX) for file in _files(data.train)) else None
    if name == "tokenizer":
        return Path(data.tokenizer).resolve()
    if name in ("fields", "template"):
        try:
            return TextFormat(data.fields, data.template).meaning
        except DataError:
            return data.fields, data.template  # one that cannot be read, which the loader tells
    if name == "max_documents_per_sequence":
        return min(data.max_documents_per_sequence, data.sequence_length)
    return getattr(data, name)


def _files(patterns: Sequence[str]) -> list[Path] | Sequence[str]:
    """The files that patterns name now; the patterns where they name none."""
    try:
        return [path.resolve() for pattern in patterns for path in expand(pattern, "data.train")]
    except DataError:
        return patterns


def _may_be_moved(before: DataConfig, now: DataConfig) -> bool:
    """Whether the files of ``before`` have the names of those of now, in other folders.

    What a pattern named in a folder that is gone is not known here; the loader compares names and contents.
    """
    names = [[Path(file).name for file in _files(data.train)] for data in (before, now)]
    return names[0] == names[1] or any(has_magic(str(file)) for file in _files(before.train) if not Path(file).exists())


def check_resumable(
    stored: Mapping[str, Any], config: TrainConfig, path: Path, initial: bool, say: Callable[[str], None]
) -> None:
    """Checks that a run with ``config`` may go on from the checkpoint at ``path``.

    What settings mean is compared, not how they are spelled. A run that met no bad line so far may begin to skip them.

    Args:
      stored: settings that the checkpoint was written with, as JSON values.
      config: those of now.
      path: for messages.
      initial: whether it holds foreign weights without any training; such a run may have other positions and data.
      say: told what changes.

    Raises:
      CheckpointError: settings differ that must not; the message lists them.
    """
    before = TrainConfig.from_dict(stored)  # settings that are newer than it have their defaults
    there = _architecture(before.model)
    differ = {
        name: f"model.{name} is {shown(there[name][1])} there and {shown(value)} here"
        for name, (meaning, value) in _architecture(config.model).items()
        if there[name][0] != meaning and there[name][1] != value
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
    changed = [
        name
        for name in _ORDER_FIELDS
        if getattr(before.data, name) != getattr(config.data, name)
        and _order(name, before.data) != _order(name, config.data)
    ]
    if before.data.on_error == "raise" and "on_error" in changed:
        changed.remove("on_error")  # no line of those that were read is left out now
    if "train" in changed and _may_be_moved(before.data, config.data):
        changed.remove("train")
        say(
            f"data.train was {shown(list(before.data.train))} and is {shown(list(config.data.train))}: the run goes on "
            "where the files there have the same names and contents"
        )
    stored, now = json.loads(before.to_json()), json.loads(config.to_json())
    differ = [f"data.{name} was {shown(stored['data'][name])} and is {shown(now['data'][name])}" for name in changed]
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

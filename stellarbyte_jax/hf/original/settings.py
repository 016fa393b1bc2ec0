"""ByteConfig from the settings of the original, and from the shapes of its tensors."""

import difflib
from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import clipped, shown
from stellarbyte_jax.hf.original.config_file import OriginalSettings
from stellarbyte_jax.hf.original.layouts import Original, Shapes
from stellarbyte_jax.hf.settings import is_bookkeeping, is_told

_TIED = "tie_word_embeddings"
# Of transformers' base class, which writes them; nothing of the original reads them.
_BASE_CLASS = ("add_cross_attention", "is_decoder", "pruned_heads", "tie_encoder_decoder")


def settings_of_tensors(layout: Original, shapes: Shapes, *, tied: bool) -> tuple[dict[str, Any], list[str]]:
    """Fields without a config file, and what is to be told: shapes give what they can, the others are defaults.

    Raises:
      ValueError: a tensor that gives sizes is missing or misshapen, or sizes do not fit the defaults.
    """
    defaults = layout.family.defaults
    found = layout.sizes(shapes, defaults) | {_TIED: tied}
    others = {name: value for name, value in defaults.items() if name not in found and value is not None}
    return defaults | found, [
        f"without a config, sizes are those of the tensors ({_pairs(found)}), other settings the original's defaults "
        f"({_pairs(others)})"
    ]


def settings_of_file(layout: Original, shapes: Shapes, read: OriginalSettings) -> tuple[dict[str, Any], list[str]]:
    """Fields that a config file gives, and what is to be told.

    Raises:
      ValueError: a field has no counterpart here; the message names each of them, and what to do.
    """
    family, values, where = layout.family, read.values, read.where
    model_type = values.get("model_type")
    if model_type not in (None, "", family.model_type):
        raise ValueError(
            f"{where}: model_type is {shown(model_type)}, and the checkpoint has the layout {layout.name}, whose "
            f"model_type is {family.model_type}: give the config that the model was trained with"
        )
    defaults = family.defaults
    idle = {*layout.without_effect, *_BASE_CLASS}
    problems = [
        f"{name} is {shown(values[name])}: {layout.refusals[name]}"
        for name, allowed in family.fixed.items()
        if name in values and values[name] not in allowed
    ]
    known = {*defaults, *family.fixed, *idle}
    unread = [name for name in values if name not in known and not is_bookkeeping(name)]
    problems += [_unknown(name, known) for name in unread if not is_told(name)]
    nulls = [n for n in defaults if n in values and values[n] is None and n not in family.nullable]
    problems += [f"{name} is null: give a value, or remove the field for the default" for name in nulls]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{where}: {'; '.join(problems[:8])}{more}")
    told = [name for name in values if name in idle or (name in unread and is_told(name))]
    notes = [*read.notes, *([f"without effect on the network here: {', '.join(map(clipped, told))}"] if told else [])]
    stated = defaults | {name: _number(values[name], like) for name, like in defaults.items() if name in values}
    if read.of_training:
        found = layout.sizes(shapes, stated)
        other = {n: value for n, value in found.items() if values.get(n) not in (None, value)}
        if other:
            notes.append(f"sizes are those of the tensors, not those of the file: {_pairs(other)}")
        stated |= found
    return stated, notes


def byte_config(layout: Original, stated: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> ByteConfig:
    """The settings that fields of the original mean, with ``overrides`` of ours.

    Raises:
      ValueError: a value has no counterpart here, or is none of its type.
    """
    try:
        return ByteConfig(**(layout.family.read(stated) | dict(overrides)))
    except ValueError as error:  # ConfigError among them
        message = str(error)
        for theirs, ours in ByteConfig._aliases.items():
            if theirs in stated:
                message = message.replace(f"ByteConfig.{ours} ", f"{theirs} ")
        raise ValueError(f"{where}: {message}") from error


def _unknown(name: str, known: set[str]) -> str:
    guess = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {guess[0]}?)" if guess else ""
    return f"{clipped(str(name), 100)}{hint}: the original reads no such field; remove it"


def _number(value: Any, like: Any) -> Any:
    """A number that the file gives as a text, as YAML reads ``1e-5``, and as the original casts it."""
    if isinstance(value, str) and type(like) in (int, float):
        try:
            return type(like)(value)
        except ValueError:
            return value
    return value


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()
    )

"""Rotary settings of ``config.json``: ``rope_scaling`` of transformers 4, ``rope_parameters`` of transformers 5."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig, ConfigError, RopeScaling
from stellarbyte_jax.config.foreign import listed, shown
from stellarbyte_jax.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, fits, spell

_log = logging.getLogger(__name__)

_ORIGINAL = "original_max_position_embeddings"
ROPE_NAMES = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", _ORIGINAL)
_TABLES = ROPE_NAMES[:2]
# Of every kind; what is said of them is checked apart from the kind's own fields.
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# For each kind the RopeScaling fields of the same name that it must have, and those that it may have.
_KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
}
# Read with them: what attention_factor is where it is not given.
_YARN_SCALES = ("mscale", "mscale_all_dim")


def parse_rope(
    values: Mapping[str, Any], max_positions: Any, where: str, default_theta: float = 10000.0
) -> tuple[float, RopeScaling]:
    """``rope_theta`` and the scaling that a ``config.json`` with ``values`` asks for.

    Args:
      values: the whole content of the file.
      max_positions: its ``max_position_embeddings``, which is the original length where no other one is given.
      where: names the file in messages.
      default_theta: what an absent ``rope_theta`` means.

    Raises:
      ValueError: a kind or a field is not implemented, a field is missing, or two of them contradict each other.
    """
    thetas = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    shares = {"partial_rotary_factor": values.get("partial_rotary_factor")}
    scalings: dict[str, RopeScaling] = {}
    for table in _TABLES:
        stated = values.get(table)
        if stated is None or stated == {}:  # transformers takes an empty table for none
            continue
        if not isinstance(stated, Mapping):
            raise ValueError(f"{where}: {table} must be an object, got {shown(stated)}")
        # Outside of the table it goes before the one inside.
        outside = {_ORIGINAL: values[_ORIGINAL]} if values.get(_ORIGINAL) is not None else {}
        scalings[table] = _parse_table({**stated, **outside}, max_positions, f"{where}: {table}", outside=bool(outside))
        thetas |= {f"{table}.rope_theta": stated["rope_theta"]} if "rope_theta" in stated else {}
        shares[f"{table}.partial_rotary_factor"] = stated.get("partial_rotary_factor")
    # Of two tables transformers reads the older one, and gives it the theta beside it or the default one.
    table = next(reversed(scalings), None)
    place = next((p for p in (f"{table}.rope_theta", "rope_theta") if p in thetas), "the default of rope_theta")
    if thetas.setdefault(place, default_theta) is None:
        raise ValueError(f"{where}: {place} is null: give a number, or remove the field for the default")
    for name, share in shares.items():
        if share not in (None, 1):
            raise ValueError(f"{where}: {name} is {shown(share)}; only whole heads are rotated here, a factor of 1")
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    for name, theta in given.items():
        if not fits(theta, PositiveFloat):
            raise ValueError(f"{where}: {name} must be {spell(PositiveFloat)}, got {shown(theta)}")
    if len(set(given.values())) > 1:
        raise ValueError(f"{where}: contradicting values {shown(given)}: keep one of them")
    if len(set(scalings.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(scalings)} contradict each other: keep one of them")
    return next(iter(given.values())), next(iter(scalings.values()), RopeScaling())


def _parse_table(stated: Mapping[str, Any], max_positions: Any, where: str, *, outside: bool) -> RopeScaling:
    # A null means the default, but of truncate, which transformers then takes for false.
    fields: dict[str, Any] = {n: value for n, value in stated.items() if value is not None or n == "truncate"}
    kinds = [fields[name] for name in ("rope_type", "type") if name in fields]
    kind = kinds[0] if kinds else "default"
    if kind not in tuple(_KINDS):
        raise ValueError(f"{where}.rope_type is {shown(kind)}; implemented are {', '.join(_KINDS)}")
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(f"{where} says rope_type {shown(kinds[0])} and type {shown(kinds[1])}: keep one of them")
    required, optional = _KINDS[kind]
    # Where transformers computes with the null.
    needed = ["type" if "rope_type" not in stated else "rope_type"]
    needed += ["partial_rotary_factor", "original_max_position_embeddings"] if kind != "default" else []
    null = [name for name in needed if name in stated and stated[name] is None]
    if null:
        raise ValueError(f"{where}.{null[0]} is null: give a value, or remove the field for the default")
    harmless: tuple[str, ...] = (_ORIGINAL,) if _ORIGINAL not in optional else ()  # nobody reads it there
    if kind == "yarn":
        harmless += _YARN_SCALES
        harmless += ("truncate",) if fields.get("truncate") is True else ()
        if "factor" in stated and stated["factor"] is None:  # what the lengths say
            fields["factor"] = _ratio(max_positions, fields.get(_ORIGINAL, max_positions), where)
    unknown = [name for name in fields if name not in (*_COMMON, *required, *optional, *harmless)]
    if kind == "yarn" and "truncate" in unknown:
        raise ValueError(f"{where}.truncate is {shown(fields['truncate'])}; only true, the default, is implemented")
    if unknown:
        raise ValueError(f"{where} holds {listed(unknown)}: not implemented for rope_type {kind!r}")
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which rope_type {kind!r} needs")
    if _ORIGINAL in stated and _ORIGINAL in harmless and not outside:
        _log.warning("%s.%s: nothing of rope_type %r reads it, here or in transformers", where, _ORIGINAL, kind)
    if kind == "default":
        return RopeScaling()
    settings = {name: fields[name] for name in (*required, *optional) if name in fields}
    if _ORIGINAL in optional:
        settings.setdefault(_ORIGINAL, max_positions)
    if kind == "yarn":
        settings |= _attention_factor(fields, where)
    if kind != "dynamic" and settings["factor"] == 1 and settings.get("attention_factor") is None:
        return RopeScaling()  # it changes nothing
    try:
        return RopeScaling(name=kind, **settings)
    except ConfigError as error:
        raise ValueError(f"{where}: {error}") from error


def _ratio(stretched: Any, original: Any, where: str) -> float:
    if not (fits(stretched, PositiveInt) and fits(original, PositiveInt)):
        raise ValueError(f"{where}.factor is null, and the lengths it follows from are no numbers: give a factor")
    return stretched / original


def _attention_factor(fields: Mapping[str, Any], where: str) -> dict[str, float]:
    """The setting that two scales of DeepSeek stand for, where it is not given itself."""
    for name in (*_YARN_SCALES, "factor"):
        if fields.get(name) is not None and not fits(fields[name], NonNegativeFloat):
            raise ValueError(f"{where}.{name} must be {spell(NonNegativeFloat)}, got {shown(fields[name])}")
    one, all_dims = (fields.get(name) for name in _YARN_SCALES)
    if fields.get("attention_factor") is not None or not (one and all_dims):
        return {}
    logarithm = math.log(max(fields["factor"], 1))
    return {"attention_factor": (0.1 * one * logarithm + 1) / (0.1 * all_dims * logarithm + 1)}


def check_rope_type(scaling: RopeScaling, allowed: tuple[str, ...] | None, where: str) -> None:
    """Raises ValueError where a family has only the kinds ``allowed``; None allows all."""
    kind = _kind(scaling)
    if allowed is not None and kind not in allowed:
        raise ValueError(f"{where}: rope_type {kind!r} means something else there; implemented is {', '.join(allowed)}")


def _kind(scaling: RopeScaling) -> str:
    return "default" if scaling.name == "none" else scaling.name


def rope_json(config: ByteConfig) -> dict[str, Any]:
    """The rotary part of ``config.json``, for readers of both generations."""
    scaling = config.rope_scaling
    table: dict[str, Any] = {"rope_type": _kind(scaling)}
    required, optional = _KINDS[table["rope_type"]]
    table |= {name: getattr(scaling, name) for name in (*required, *optional)}
    if _ORIGINAL in optional:
        table[_ORIGINAL] = scaling.original_max_position_embeddings or config.max_position_embeddings
    table = {name: value for name, value in table.items() if value is not None}
    written = {"rope_theta": config.rope_theta, "rope_parameters": table | {"rope_theta": config.rope_theta}}
    return written if scaling.name == "none" else written | {"rope_scaling": table}

"""How a checkpoint spells the weights of experts, and whether there are as many as its settings say."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.hf.table import Family, Row


class Headers(Protocol):
    """What is known of foreign tensors before they are read."""

    def names(self) -> list[str]:
        """Every tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...


def as_spelled(family: Family, config: ByteConfig, tensors: Headers, where: str) -> Family:
    """The family with the rows that a checkpoint has: those for each expert, or those for all experts of a layer.

    Its experts are counted before anything is made of their number.

    Args:
      family: as it is written.
      config: of the checkpoint.
      tensors: of the checkpoint.
      where: names it in messages.

    Raises:
      ValueError: there are tensors of both spellings, or in no layer as many experts as ``config`` says.
    """
    if not family.fused:
        return family
    leaves = {row.ours for row in family.fused}
    listed = [row for row in family.rows if row.ours in leaves]
    names = sorted(tensors.names())
    one = next((name for name, *_ in _found(listed, names)), None)
    other = next((name for name, *_ in _found(family.fused, names)), None)
    if one is not None and other is not None:
        raise ValueError(
            f"{where} spells experts in two ways, {clipped(one)} and {clipped(other)}: load it with transformers and "
            "save it anew, or copy the files again"
        )
    if other is not None:
        family = replace(family, rows=(*(row for row in family.rows if row.ours not in leaves), *family.fused))
    _check_number([row for row in family.rows if row.ours in leaves], config, tensors, where)
    return family


def _check_number(rows: list[Row], config: ByteConfig, tensors: Headers, where: str) -> None:
    listed: dict[int, set[str]] = {}
    counts = dict.fromkeys(config.moe_layers, 0)
    for name, row, layer, expert in _found(rows, tensors.names()):
        if layer not in counts or "/experts/" not in row.ours:
            continue
        if expert is None:
            counts[layer] = max(counts[layer], *tensors.shape(name)[:1], 0)
        else:
            listed.setdefault(layer, set()).add(expert)
            counts[layer] = len(listed[layer])
    if config.moe.num_experts not in counts.values():
        least, most = min(counts.values()), max(counts.values())
        raise ValueError(
            f"{where}: a layer with experts has {most if least == most else f'{least} to {most}'} of them in the "
            f"files, and config.json says {config.moe.num_experts}: mend config.json, or copy the files again"
        )


def _found(rows: Iterable[Row], names: Iterable[str]) -> Iterator[tuple[str, Row, int, str | None]]:
    """Names of tensors that belong to rows, with the layer, and the expert where there is a tensor for each."""
    patterns = [(re.compile(_pattern(row.theirs)), row) for row in rows]
    for name in names:
        for pattern, row in patterns:
            match = pattern.fullmatch(name)
            if match:
                yield name, row, int(match["i"]), match.groupdict().get("e")


def _pattern(theirs: str) -> str:
    return re.escape(theirs).replace(r"\{i\}", r"(?P<i>\d{1,9})").replace(r"\{e\}", r"(?P<e>\d{1,9})")

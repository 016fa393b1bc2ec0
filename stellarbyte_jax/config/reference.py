"""What every setting means: for ``--list-settings``, for ``docs/settings.md``, and what a run's start prints.

Meanings stand in the docstrings of the sections, where ``help(ByteConfig)`` shows them.

    python -m stellarbyte_jax.config.reference > docs/settings.md
"""

import dataclasses
import fnmatch
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.config.run import TrainConfig
from stellarbyte_jax.config.section import USUAL, Section, hints, is_section, spell, written

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      name: as ``--set`` takes it, such as ``model.hidden_size``.
      kind: its type and rule, in words.
      default: its value where none is given, or REQUIRED.
      meaning: what it decides, with its unit.
    """

    name: str
    kind: str
    default: Any
    meaning: str


def settings(section: type[Section] = TrainConfig, prefix: str = "") -> Iterator[Setting]:
    """All settings of a section and of those inside it, in the order of their definition."""
    told = meanings(section)
    inner = []
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        hint = hints(section)[field.name]
        if is_section(hint):
            inner.append((hint, f"{prefix}{field.name}."))
        else:
            yield Setting(prefix + field.name, spell(hint), field.default, told.get(field.name, ""))
    for each, longer in inner:
        yield from settings(each, longer)


def meanings(section: type[Section]) -> dict[str, str]:
    """The entries of ``Attributes:`` in a section's docstring; none under ``python -OO``, which leaves them out."""
    _, _, text = (inspect.getdoc(section) or "").partition("Attributes:\n")
    entries = re.split(r"^  (?=\w)", text, flags=re.MULTILINE)[1:]
    pairs = (entry.partition(":")[::2] for entry in entries)
    return {name: " ".join(meaning.split()) for name, meaning in pairs}


def matching(pattern: str) -> list[Setting]:
    """Settings whose name or meaning holds a text, or whose name fits a pattern with ``*``; all for an empty one."""
    wanted = USUAL.get(pattern.lower(), pattern.lower())
    return [
        each
        for each in settings()
        if fnmatch.fnmatch(each.name, wanted) or wanted in each.name or wanted in each.meaning.lower()
    ]


def changed(config: Section, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Name: (value, default) of each setting that has no default or differs from it."""
    found = {}
    inner: dict[str, Section] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, Section):
            inner[f"{prefix}{field.name}."] = value
        elif value != field.default:  # as nothing equals REQUIRED
            found[prefix + field.name] = (value, field.default)
    for longer, section in inner.items():
        found |= changed(section, longer)
    return found


def listed(chosen: list[Setting]) -> str:
    """Settings for a terminal: name and default, type, meaning."""
    lines = []
    for each in chosen:
        default = "(must be given)" if each.default is REQUIRED else f"= {written(each.default)}"
        lines += [f"{each.name} {default}", f"    {each.meaning}", f"    {each.kind}"]
    return "\n".join(lines)


def markdown() -> str:
    """The page ``docs/settings.md``."""
    lines = [
        "# Settings",
        "",
        "Every setting of a run: a field of the config file, or `--set name=value` on the command line; lists as",
        "JSON or as `a,b`, `none` for no value, `~` at the beginning of a path for the home directory.",
        "`stellarbyte train --list-settings [PATTERN]` prints the same.",
        "This page is made by `python -m stellarbyte_jax.config.reference > docs/settings.md`.",
    ]
    section = None
    for each in settings():
        group = each.name.rpartition(".")[0]
        if group != section:
            section = group
            lines += ["", f"## {group or 'run'}", "", "| setting | default | meaning | type |", "|---|---|---|---|"]
        default = "" if each.default is REQUIRED else f"`{written(each.default)}`"
        cells = [f"`{each.name}`", default, each.meaning, each.kind]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")

"""Which characters of a prompt came from a message: texts that carry it through what a chat template does to them.

A special token that a message spells must stay text, whatever the template does around it, so it is not enough to look
for spellings: a token may be put together from two messages, from a message and the template's own text, or by a
template that takes characters out. Only characters that the template wrote by itself make control tokens.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from jinja2 import Undefined
from markupsafe import Markup

_HIDDEN = "\ufdd0"  # one of the characters that Unicode keeps free for such uses

Spans = tuple[tuple[int, int], ...]


class Traced(str):
    """A text with the places of what came from messages; an operator or method that cuts it cuts these too.

    What other operations make of it, :func:`followed` finds out.
    """

    __slots__ = ("_said",)
    _said: Spans  # begin and end of each piece, in order; templates cannot see names that begin so

    def __new__(cls, text: str, said: Iterable[tuple[int, int]] | None = None) -> "Traced":
        """A text; all of it came from a message where ``said`` names no pieces."""
        made = super().__new__(cls, text)
        spans = ((0, len(text)),) if said is None else said
        made._said = tuple((begin, end) for begin, end in spans if begin < end)
        return made

    def __str__(self) -> "Traced":
        return self

    def __add__(self, other: str) -> str:
        return joined((self, other)) if _is_plain(other) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if _is_plain(other) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> "Traced":
        cut = super().__getitem__(key)
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step != 1:
                return Traced(cut, None if self._said else ())
        else:
            begin = key.__index__() % len(self)
            end = begin + 1
        return Traced(cut, ((max(a, begin) - begin, min(b, end) - begin) for a, b in self._said))

    def __iter__(self) -> Iterator["Traced"]:
        return (self[at] for at in range(len(self)))

    def strip(self, chars: str | None = None, /) -> "Traced":
        """Without the characters at both ends."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Traced":
        """Without the characters at the beginning."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Traced":
        """Without the characters at the end."""
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> "Traced":
        """Without a beginning."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> "Traced":
        """Without an end."""
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """The pieces between separators."""
        return self._cut(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """The pieces between separators, counted from the end."""
        return self._cut(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """The lines."""
        return self._cut(super().splitlines(keepends), "" if keepends else None)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """What is before a separator, it, and what is after it."""
        return tuple(self._cut(super().partition(sep), ""))  # type: ignore[return-value]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """The same for the last separator."""
        return tuple(self._cut(super().rpartition(sep), ""))  # type: ignore[return-value]

    def _cut(self, pieces: Iterable[str], between: str | None) -> list[str]:
        """The pieces, which follow each other with ``between`` in the middle, or with what no piece begins with."""
        found, at = [], 0
        for piece in pieces:
            at = self.find(piece, at) if between is None else at
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(between or "")
        return found


class Safe(Markup):
    """What a filter has marked as safe HTML, whose characters are those of a message too."""

    __slots__ = ()

    def __str__(self) -> Traced:
        return Traced(str.__str__(self))

    def __iter__(self) -> Iterator[str]:
        return iter(str(self))

    def __repr__(self) -> str:
        return repr(Markup(str.__str__(self)))


def trace(value: Any) -> Any:
    """A message, or a part of one, with traced texts; the name of a role is the program's own word."""
    if isinstance(value, str):
        return Traced(value)
    if isinstance(value, Mapping):
        named = {trace(key): trace(part) for key, part in value.items()}
        role = value.get("role")
        return {**named, "role": role} if isinstance(role, str) and role.isidentifier() else named
    return [trace(part) for part in value] if isinstance(value, list | tuple) else value


def said(text: str) -> Spans:
    """Where a text came from messages. What a template has marked as safe HTML counts, since that forgets it."""
    if isinstance(text, Traced):
        return text._said
    return ((0, len(text)),) if isinstance(text, Markup) and text else ()


def is_said(value: Any) -> bool:
    """Whether a single value may hold something of a message; bytes may."""
    return isinstance(value, Traced | Markup | bytes | bytearray)


def joined(parts: Iterable[str]) -> str:
    """The texts in one."""
    parts = list(parts)
    text = "".join(parts)
    if not any(isinstance(part, Traced | Markup) for part in parts):
        return text
    spans: list[tuple[int, int]] = []
    at = 0
    for part in parts:
        spans += [(at + begin, at + end) for begin, end in said(part)]
        at += len(part)
    return Traced(text, spans)


def followed(made: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function made of traced values, traced.

    The function is called again with each character of a message hidden. Where the result has them in the same places
    and is the same besides, that is where they went; otherwise all of it counts as said.
    """
    if type(made) is Markup:
        return Safe(made)
    if not isinstance(made, str) or isinstance(made, Markup):
        return made
    made = str.__str__(made)  # a function may have put together a part of it without a trace
    try:
        hidden = function(*_hide(tuple(args)), **_hide(dict(kwargs)))
    except Exception:  # as different as can be
        return Traced(made)
    if not isinstance(hidden, str) or len(hidden) != len(made):
        return Traced(made)
    traced = Traced(made, (found.span() for found in re.finditer(f"{_HIDDEN}+", hidden)))
    return traced if _hide(traced) == hidden else Traced(made)


def _hide(value: Any) -> Any:
    if isinstance(value, Traced):
        pieces, at = [], 0
        for begin, end in value._said:
            pieces += [str.__getitem__(value, slice(at, begin)), _HIDDEN * (end - begin)]
            at = end
        return "".join([*pieces, str.__getitem__(value, slice(at, None))])
    if type(value) is dict:
        return {_hide(key): _hide(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_hide, value))
    if type(value) is str or value is None or isinstance(value, int | float | Undefined):
        return value
    raise TypeError(f"a {type(value).__name__} may hold what cannot be hidden")


def _is_plain(other: Any) -> bool:
    return isinstance(other, str) and not isinstance(other, Markup)

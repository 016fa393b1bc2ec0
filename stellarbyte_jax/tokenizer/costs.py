"""What a chat template may spend: steps, and the size of what it makes, counted before it is made.

A template comes with a model that anybody may have published. Loops, calls, operators, methods and filters each cost
steps and bytes; a text or a list beyond a limit is refused. So rendering ends after seconds, whatever the template
says, and in memory that the conversation bounds.
"""

import re
import sys
import threading
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, ValuesView
from typing import Any, NamedTuple

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

from stellarbyte_jax.tokenizer.provenance import is_said

LONGEST_TEXT = 10_000_000  # characters
MOST_ELEMENTS = 300_000  # of lists and what they hold
MOST_STEPS = 1_000_000
STEPS_A_MESSAGE = 1_000  # a rich template takes about a hundred
_MOST_BITS = 10_000  # of a number
_MOST_PADDING = 100_000  # what a width, a count or a format adds
_MOST_DIGITS = 100
_MOST_BYTES = 1 << 28  # of texts that are read and made
_COPIES = 16  # of the whole conversation for each message, as where a text is put together piece by piece
_SEARCHED_A_STEP = 256
_SLOW_CHARACTERS_A_STEP = 4
_ELEMENTS_A_STEP = 8
_CONTAINERS = (list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView)


class Weight(NamedTuple):
    """Of a value and all that it holds; what is held twice counts twice.

    Attributes:
      characters: that it is spelled with, at least.
      bytes: of its texts in memory.
      elements: of it and of what it holds.
      depth: of lists in lists.
      said: whether a message brought some of it.
    """

    characters: int
    bytes: int
    elements: int
    depth: int
    said: bool


def weigh(value: Any) -> Weight:
    """Counts a value, without recursion and only up to the limits.

    Raises:
      SecurityError: it is larger than they are.
    """
    characters = size = elements = deepest = 0
    said = False
    left = [(value, 0)]
    while left:
        value, depth = left.pop()
        elements += 1
        deepest = max(deepest, depth)
        if isinstance(value, str | bytes | bytearray):
            characters += len(value)
            size += sys.getsizeof(value)
            said = said or is_said(value)
        elif isinstance(value, int):
            characters += check_number(value).bit_length() // 3
        elif isinstance(value, range):
            elements += len(value)
        elif isinstance(value, _CONTAINERS):
            if elements + len(value) <= MOST_ELEMENTS:
                held = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
                left.extend((element, depth + 1) for element in held)
            else:
                elements += len(value)
        elif isinstance(value, Namespace):
            left.append((value._Namespace__attrs, depth + 1))
        if characters > LONGEST_TEXT or elements > MOST_ELEMENTS:
            raise SecurityError(f"a value of more than {LONGEST_TEXT:,} characters or {MOST_ELEMENTS:,} elements")
    return Weight(characters, size, elements, deepest, said)


def check_text(size: int) -> None:
    """Raises SecurityError for more characters than a text may have."""
    if size > LONGEST_TEXT:
        raise SecurityError(f"a text of {size} characters")


def check_list(size: int) -> None:
    """Raises SecurityError for more elements than a list may have."""
    if size > MOST_ELEMENTS:
        raise SecurityError(f"a list of {size} elements")


def check_number(number: int) -> int:
    """The number. Raises SecurityError where it has too many digits."""
    if number.bit_length() > _MOST_BITS:
        raise SecurityError("a number that is too large")
    return number


class Budget(threading.local):
    """Steps that one rendering may still take and bytes that it may read and make, in each thread by itself."""

    def __init__(self) -> None:
        """That of an empty conversation, for what is computed while a template is compiled."""
        self.start(())

    def start(self, messages: Sequence[Any]) -> None:
        """Begins to render a conversation."""
        weights = [weigh(message) for message in messages]
        size = sum(weight.bytes for weight in weights)
        characters = sum(weight.characters for weight in weights)  # a template may go through the lines of a message
        self._most = self._left = MOST_STEPS + STEPS_A_MESSAGE * len(messages) + characters
        self._most_bytes = self._bytes = _MOST_BYTES + _COPIES * len(messages) * size

    def spend(self, steps: int) -> None:
        """Counts steps. Raises SecurityError where there were too many."""
        self._left -= steps
        if self._left < 0:
            raise SecurityError(f"it takes more than {self._most:,} steps")

    def _read(self, size: int) -> None:
        self._bytes -= size
        if self._bytes < 0:
            raise SecurityError(f"it reads and makes more than {self._most_bytes:,} bytes")

    def spend_on(self, *values: Any, slow: bool = False) -> bool:
        """Counts what reading all of these costs; whether a message brought some of it.

        Raises:
          SecurityError: one is too large, or the budget is spent.
        """
        said = False
        for value in values:
            weight = weigh(value)
            self.spend(1 + weight.elements // _ELEMENTS_A_STEP)
            self.spend(weight.characters // _SLOW_CHARACTERS_A_STEP if slow else 0)
            self._read(weight.bytes)
            said = said or weight.said
        return said

    def spend_on_top(self, value: Any) -> None:
        """Counts a value without what it holds.

        Raises:
          SecurityError: it is too large, or the budget is spent.
        """
        if isinstance(value, str | bytes | bytearray):
            check_text(len(value))
            self.spend(1)
            self._read(sys.getsizeof(value))
        elif isinstance(value, _CONTAINERS):
            check_list(len(value))
            self.spend(1 + len(value) // _ELEMENTS_A_STEP)
        elif isinstance(value, int):
            check_number(value)

    def spend_on_search(self, text: Any, sought: Any) -> None:
        """Counts a search that may compare each place with all that is sought."""
        if isinstance(sought, str | bytes):
            self.spend(len(text) * len(sought) // _SEARCHED_A_STEP)


def check_product(left: Any, right: Any) -> None:
    """Of a text or a list and a number; that of two numbers is bounded by what numbers may be."""
    for repeated, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(repeated, str | bytes | bytearray):
            check_text(len(repeated) * times)
        elif isinstance(times, int) and isinstance(repeated, list | tuple):
            check_list(len(repeated) * times)


def check_power(left: Any, right: Any) -> None:
    """Of two numbers."""
    if not (abs(left) <= 10_000 and abs(right) <= 100):
        raise SecurityError("a power that is too large")


def check_format(text: str | bytes, values: Any) -> None:
    """Of ``%`` and ``str.format``: widths, precisions, and values that are named more than once."""
    spelled = text if isinstance(text, str) else text.decode("latin-1")
    fields = re.sub(r"\{\{|\}\}", "", spelled)
    specifications = [*re.findall(r"%[^a-zA-Z%]*", spelled), *re.findall(r"\{[^{}]*", fields)]
    if re.search(r"\{[^{}]*\{", fields) or any("*" in found for found in specifications if found[0] == "%"):
        raise SecurityError("a width that is a value")
    _check_padding(sum(int(number[:20]) for found in specifications for number in re.findall("[0-9]+", found)))
    check_text(len(spelled) + weigh(values).characters * len(specifications))


def _check_padding(size: Any) -> None:
    if isinstance(size, int) and abs(size) > _MOST_PADDING:
        raise SecurityError(f"a width or a count above {_MOST_PADDING:,}")


def _check_join(parts: Any, between: Any = "", attribute: Any = None) -> None:
    weight = weigh(parts)
    check_text(weight.characters + weigh(between).characters * weight.elements)


def _check_replace(text: Any, old: Any, new: Any, count: Any = -1) -> None:
    text, old, new = (x if isinstance(x, bytes) else str(x) for x in (text, old, new))
    found = text.count(old)
    check_text(len(text) + len(new) * (min(found, count) if isinstance(count, int) and count >= 0 else found))


def _check_split(text: Any, sep: Any = None, maxsplit: Any = -1) -> None:
    spaces: Any = (" ", "\n", "\t", "\r") if isinstance(text, str) else (b" ", b"\n", b"\t", b"\r")
    pieces = sum(map(text.count, spaces)) if sep is None else text.count(sep)
    check_list(min(pieces, maxsplit) if isinstance(maxsplit, int) and maxsplit >= 0 else pieces)


def _check_tabs(text: Any, tabsize: int = 8) -> None:
    check_text(len(text) + text.count("\t" if isinstance(text, str) else b"\t") * tabsize)


def _check_translation(text: str | bytes, table: Any, *_: Any) -> None:
    check_text(len(text) * max(1, weigh(table).characters))


def _check_lines(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> None:
    check_text((len(str(text).splitlines()) + 1) * (len(width) if isinstance(width, str) else width))


def _check_wrap(text: Any, width: int = 79, break_long_words: Any = True, wrapstring: Any = None, *_: Any) -> None:
    check_text(len(str(text)) * (1 + len(wrapstring or "")))


def _check_json(value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, *_: Any) -> None:
    width = len(indent) if isinstance(indent, str) else indent or 0
    _check_padding(width)
    weight = weigh(value)
    check_text(weight.characters + weight.elements * (weight.depth * width + weigh(separators).characters))


def _check_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    if abs(precision) > _MOST_DIGITS:
        raise SecurityError(f"rounding to more than {_MOST_DIGITS} digits")


def _check_sum(values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):  # lists, copied at every addition
        check_list(len(values) * weigh([values, start]).elements)


def _check_size(value: Any, size: Any = 0, *_: Any) -> None:
    _check_padding(size)


# Their arguments, after what Jinja passes, by the names that a template gives them. Each is checked before it is made.
CHECKS_OF_FILTERS: dict[str, Callable[..., None]] = {
    "batch": _check_size,
    "center": _check_size,
    "format": lambda text, *args, **kwargs: check_format(str(text), [args, kwargs]),
    "indent": _check_lines,
    "join": _check_join,
    "list": lambda value: check_list(len(value)) if isinstance(value, str | bytes) else None,
    "replace": _check_replace,
    "round": _check_round,
    "slice": _check_size,
    "sum": _check_sum,
    "tojson": _check_json,
    "truncate": _check_size,
    "wordwrap": _check_wrap,
}
# The object and the arguments.
CHECKS_OF_METHODS: dict[str, Callable[..., None]] = {
    "center": _check_size,
    "expandtabs": _check_tabs,
    "format": lambda text, *args, **kwargs: check_format(text, [args, kwargs]),
    "format_map": check_format,
    "hex": lambda data, sep="", *_: check_text(len(data) * (2 + len(sep))),
    "join": lambda between, parts: _check_join(parts, between),
    "ljust": _check_size,
    "replace": _check_replace,
    "rjust": _check_size,
    "rsplit": _check_split,
    "split": _check_split,
    "splitlines": lambda text, *_: check_list(len(text.splitlines()) if len(text) > MOST_ELEMENTS else 0),
    "to_bytes": _check_size,
    "translate": _check_translation,
    "zfill": _check_size,
}
SLOW_FILTERS = frozenset(
    ("pprint", "striptags", "title", "truncate", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr")
)
# They take as long for a large value as for a small one.
FREE_FILTERS = frozenset("attr count d default first last length random".split())
# They do not read what the elements hold.
SHALLOW_FILTERS = FREE_FILTERS | frozenset(
    "batch items list map reject rejectattr reverse select selectattr slice".split()
)
DEEP_TESTS = frozenset(
    "== != > >= < <= eq equalto ne gt greaterthan ge lt lessthan le in lower upper divisibleby".split()
)
SEARCHES = frozenset(("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"))

"""Chat templates: Jinja sources that make a prompt of messages, with what ``transformers`` gives them to work with."""

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Of repeated or padded text, so that a template cannot fill the memory.
_LONGEST_TEXT = 10_000_000
_PADDING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs")


class ChatTemplate:
    """A compiled template.

    Attributes:
      source: in Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        """Compiles the template.

        Args:
          source: in Jinja.
          special_tokens: spellings by their names, such as ``bos_token``, as the template may ask for them.
          where: the tokenizer's directory, for messages.

        Raises:
          ValueError: the template is not valid.
        """
        self.source, self._special_tokens, self._where = source, dict(special_tokens), where
        try:
            self._template = _environment().from_string(source)
        except (_template_error(), RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template of {where} is not valid: {_line(error)}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
          ValueError: the template refuses the messages, or fails.
        """
        try:
            pieces, size = [], 0
            for piece in self._template.generate(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > _LONGEST_TEXT:
                    raise OverflowError(f"it writes more than {_LONGEST_TEXT:,} characters")
            return "".join(pieces)
        except Exception as error:  # a template can fail in any way that Python can
            raise ValueError(f"the chat template of {self._where} refuses the messages: {_line(error)}") from None


def _line(error: BaseException) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError

    return TemplateError


def _environment() -> Any:
    """The sandbox in which templates are run, with the filters, functions and tags that ``transformers`` has."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.filters import FILTERS
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks what an assistant says; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            """A block whose content is kept."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            return caller()

    class Environment(ImmutableSandboxedEnvironment):
        """Also bounds the size of texts that operators and methods make."""

        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                for text, times in ((left, right), (right, left)):
                    if isinstance(text, str | list | tuple) and isinstance(times, int):
                        bounded(len(text) * times)
            if operator == "**" and not (abs(left) <= 10_000 and abs(right) <= 100):
                raise SecurityError("a power that is too large")
            if operator == "%" and isinstance(left, str):
                bounded_format(left)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            if getattr(obj, "__name__", None) in _PADDING_METHODS:
                bounded(max((x for x in args if isinstance(x, int)), default=0))
            return super().call(context, obj, *args, **kwargs)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            if getattr(value, "__name__", None) in ("format", "format_map"):
                text = getattr(value, "__self__", None)
                if isinstance(text, str):
                    bounded_format(text)
            return super().wrap_str_format(value)

    def bounded(size: int) -> None:
        if size > _LONGEST_TEXT:
            raise SecurityError(f"a text of {size} characters")

    def bounded_format(text: str) -> None:
        bounded(max(map(int, re.findall(r"[0-9]{1,20}", text)), default=0))
        if re.search(r"%[^a-zA-Z%]*\*", text):
            raise SecurityError("a width that is a value")

    def formatted(text: str, *args: Any, **kwargs: Any) -> str:
        bounded_format(text)
        return do_format(text, *args, **kwargs)

    def padding(original: Callable[..., Any]) -> Callable[..., Any]:
        def filtered(text: Any, *args: Any, **kwargs: Any) -> Any:
            bounded(max((x for x in (*args, *kwargs.values()) if isinstance(x, int)), default=0))
            return original(text, *args, **kwargs)

        return filtered

    def refuse(message: str) -> Any:
        raise TemplateError(message)

    do_format = FILTERS["format"]
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.filters["center"] = padding(environment.filters["center"])
    environment.filters["indent"] = padding(environment.filters["indent"])
    environment.filters["format"] = formatted
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """JSON without escapes for HTML, as ``transformers`` writes it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

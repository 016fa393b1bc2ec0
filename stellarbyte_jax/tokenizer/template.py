"""Chat templates: Jinja sources that make a prompt of messages, with what ``transformers`` gives them to work with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.tokenizer.provenance import Traced, trace
from stellarbyte_jax.tokenizer.sandbox import Written, make_environment

_REASONING = ("reasoning_content", "thinking", "reasoning")


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
            self._environment = make_environment()
            self._template = self._environment.from_string(source)
        except Exception as error:  # also what Python's own compiler says of generated code
            raise ValueError(f"the chat template of {where} is not valid: {_line(error)}") from None

    @property
    def marks_replies(self) -> bool:
        """Whether it says by ``{% generation %}`` what an assistant writes."""
        return self._environment.marks_replies

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        traced: Callable[[int | None], bool] = lambda number: True,
    ) -> str:
        """The text of a conversation, ``provenance.Traced`` where a message brought some of it.

        Args:
          messages: with ``role`` and what else the template reads.
          add_generation_prompt: whether the beginning of a reply follows.
          tools: descriptions of the functions that may be called.
          traced: whether what the message of a number, from 0, brings is to be followed; None stands for the tools.

        Raises:
          ValueError: the template refuses the messages, or fails.
        """
        return self._rendered(messages, add_generation_prompt, tools, traced, None)

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a whole conversation, and the places in it that ``{% generation %}`` marks.

        Raises:
          ValueError: the template refuses the messages, fails, or marks what it does not write there and then.
        """
        written = Written()
        text = self._rendered(messages, False, tools, lambda number: True, written)
        places = [(begin, begin + len(said)) for begin, said in written.marked]
        if any(text[begin:end] != said for (begin, end), (_, said) in zip(places, written.marked, strict=True)):
            raise ValueError(
                f"the chat template of {self._where} has {{% generation %}} in a macro, a set block or a filter, so "
                "that the place of a reply in the text is not known: move it out of there"
            )
        return text, places

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None,
        traced: Callable[[int | None], bool],
        written: Written | None,
    ) -> str:
        try:
            messages = [_with_reasoning(message) for message in messages]
            self._environment.budget.start((*messages, *(tools or ())))
            self._environment.written = written
            pieces = self._template.generate(
                messages=[trace(message) if traced(number) else message for number, message in enumerate(messages)],
                tools=None if tools is None else trace(tools) if traced(None) else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
            return self._environment.concat(pieces if written is None else written.follow(pieces))
        except Exception as error:  # a template can fail in any way that Python can
            raise ValueError(f"the chat template of {self._where} refuses the messages: {_line(error)}") from None


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with its thoughts under the names that templates read, as ``transformers`` 5.24 gives it."""
    thoughts = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _line(error: BaseException) -> str:
    told = str(error).strip() or type(error).__name__
    for name in (f"{Traced.__module__}.{Traced.__name__}", f"'{Traced.__name__}'"):  # who writes templates knows str
        told = told.replace(name, "'str'" if name.startswith("'") else "str")
    return clipped(" ".join(told.split()), 300)

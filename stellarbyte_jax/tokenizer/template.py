"""Chat templates: Jinja sources that make a prompt of messages, with what ``transformers`` gives them to work with."""

from collections.abc import Mapping, Sequence
from typing import Any

from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.tokenizer.provenance import trace
from stellarbyte_jax.tokenizer.sandbox import make_environment


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

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation, ``provenance.Traced`` where a message brought some of it.

        Raises:
          ValueError: the template refuses the messages, or fails.
        """
        try:
            self._environment.budget.start(messages)
            pieces = self._template.generate(
                messages=[trace(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
            return self._environment.concat(pieces)
        except Exception as error:  # a template can fail in any way that Python can
            raise ValueError(f"the chat template of {self._where} refuses the messages: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return clipped(" ".join((str(error).strip() or type(error).__name__).split()), 300)

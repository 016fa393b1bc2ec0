"""Conversations: messages to a prompt by the tokenizer's chat template."""

from typing import Any

from stellarbyte_jax.data.tokenizer import Tokenizer


class Conversation:
    """The messages so far, and the prompt for the next reply.

    Attributes:
      messages: dicts with ``role`` and ``content``, oldest first.
    """

    def __init__(self, tokenizer: Tokenizer, *, system: str | None = None) -> None:
        """Begins with a system message where one is given.

        Raises:
          ValueError: the tokenizer has no chat template, or it is not valid.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer in {tokenizer.path} has no chat_template, so this is no chat model: "
                "generate without chat"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(tokenizer.chat_template)
        except TemplateError as error:
            raise ValueError(f"the chat template of {tokenizer.path} is not valid: {error}") from None
        self._tokenizer = tokenizer
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def ask(self, text: str) -> list[int]:
        """Adds a user's message and returns the ids of the prompt for its reply.

        Raises:
          ValueError: the template refuses the messages.
        """
        from jinja2 import TemplateError

        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._template.render(
                messages=self.messages,
                add_generation_prompt=True,
                bos_token=self._spell(self._tokenizer.bos_id),
                eos_token=self._spell(self._tokenizer.eos_id),
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of {self._tokenizer.path} refuses the messages: {error}") from None
        return self._tokenizer.encode(prompt, parse_special=True)

    def answer(self, text: str) -> None:
        """Adds the reply."""
        self.messages.append({"role": "assistant", "content": text})

    def _spell(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.decode([token], skip_special_tokens=False)


def _refuse(message: str) -> Any:
    from jinja2 import TemplateError

    raise TemplateError(message)

"""Conversations: messages to a prompt by the tokenizer's chat template."""

from typing import Any

from stellarbyte_jax.tokenizer.codec import Tokenizer


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

    def ask(self, text: str, *, limit: int | None = None) -> list[int]:
        """Adds a user's message and returns the ids of the prompt for its reply.

        Where they would be more than ``limit``, the oldest turns are forgotten: a user's message and what follows it up
        to the next one. The system message and the new message stay.

        Raises:
          ValueError: the template refuses the messages, or those that stay are too long.
        """
        self.messages.append({"role": "user", "content": text})
        ids = self._prompt()
        while limit is not None and len(ids) > limit:
            turns = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
            if len(turns) == 1:
                raise ValueError(
                    f"the message makes a prompt of {len(ids)} tokens, and there is room for {limit}: shorten it, or "
                    "ask for fewer new tokens"
                )
            del self.messages[turns[0] : turns[1]]
            ids = self._prompt()
        return ids

    def answer(self, text: str) -> None:
        """Adds the reply."""
        self.messages.append({"role": "assistant", "content": text})

    def _prompt(self) -> list[int]:
        from jinja2 import TemplateError

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

    def _spell(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.decode([token], skip_special_tokens=False)


def _refuse(message: str) -> Any:
    from jinja2 import TemplateError

    raise TemplateError(message)

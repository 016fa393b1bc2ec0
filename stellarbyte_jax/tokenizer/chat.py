"""Conversations: messages to a prompt by the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from stellarbyte_jax.tokenizer.codec import Tokenizer
from stellarbyte_jax.tokenizer.provenance import said
from stellarbyte_jax.tokenizer.template import ChatTemplate


class Conversation:
    """The messages so far, and the prompt for the next reply.

    Attributes:
      messages: dicts with ``role`` and ``content``, oldest first.
    """

    def __init__(self, tokenizer: Tokenizer, *, system: str | None = None, parse_contents: bool = False) -> None:
        """Begins with a system message where one is given.

        Args:
          tokenizer: the model's.
          system: the system message.
          parse_contents: whether special tokens that a message spells become control tokens, so that whoever writes
            messages can end them and speak as another role.

        Raises:
          ValueError: the tokenizer has no chat template, or it is not valid.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer in {tokenizer.path} has no chat_template, so this is no chat model: "
                "generate without chat"
            )
        self._template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, tokenizer.path)
        self._parse_contents = parse_contents
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
                    "lower max_new_tokens"
                )
            del self.messages[turns[0] : turns[1]]
            ids = self._prompt()
        return ids

    def answer(self, text: str) -> None:
        """Adds the reply."""
        self.messages.append({"role": "assistant", "content": text})

    def _prompt(self) -> list[int]:
        if self._parse_contents:
            text = self._template.render(self.messages, add_generation_prompt=True)
            return self._tokenizer.encode(str.__str__(text), parse_special=True)
        return encode_messages(self._tokenizer, self._template, self.messages)


def encode_messages(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], *, prompt: bool = True
) -> list[int]:
    """Ids of a conversation. Special tokens that the template writes are control tokens, those in contents are text.

    Added tokens that are not special but that the template writes, such as ``<think>``, are text in contents too.

    Args:
      tokenizer: the model's.
      template: its chat template.
      messages: with ``role`` and ``content``.
      prompt: whether the beginning of a reply follows.

    Raises:
      ValueError: the template refuses the messages.
    """
    text = template.render(messages, add_generation_prompt=prompt)
    return tokenizer.encode_around(str.__str__(text), said(text), template.source)

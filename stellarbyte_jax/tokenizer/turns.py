"""Which tokens of a conversation its assistant writes: what a model is trained on."""

import bisect
import functools
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.tokenizer.codec import Tokenizer
from stellarbyte_jax.tokenizer.provenance import Spans, said
from stellarbyte_jax.tokenizer.template import ChatTemplate

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Turns:
    """A conversation in tokens.

    Attributes:
      ids: of all tokens.
      replies: of each token the number of the assistant's turn that it belongs to, from 1; 0: to none.
    """

    ids: list[int]
    replies: list[int]


class TurnEncoder:
    """Makes tokens of conversations.

    What an assistant writes is a reply with the token that ends it: what ``{% generation %}`` marks where the template
    has that, else all from the end of the prompt for a reply to the first special token after it, or the last of those
    that together end a reply. Contents are text: special tokens that they spell are none.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        """Keeps both."""
        self._tokenizer, self._template = tokenizer, template
        # What no text holds, where there is no special token.
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_spellings)) or r"(?!)")

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> Turns:
        """Tokens of a whole conversation.

        Args:
          messages: with ``role`` and ``content``; at least one of the assistant.
          tools: descriptions of the functions that may be called.

        Raises:
          ValueError: the template refuses the messages, or leaves out what the assistant says.
        """
        if self._template.marks_replies:
            text, places = self._template.render_marked(messages, tools)
            numbers = self._owners(places, messages, tools)
        else:
            text = self._template.render(messages, add_generation_prompt=False, tools=tools)
            places = self._replies(text, messages, tools)
            numbers = list(range(1, len(places) + 1))
        plain = str.__str__(text)
        ids, at = self._tokenizer.encode_with_places(plain, said(text), self._template.source)
        ends = [end for _, end in places]
        replies = []
        for token, (begin, end) in zip(ids, at, strict=True):
            number = bisect.bisect_right(ends, begin)  # the first reply that ends after the token begins
            touches = number < len(places) and places[number][0] < max(end, begin + 1)
            # A special token of the prompt may take the spaces with which a reply begins.
            touches = touches and (places[number][0] <= begin or token not in self._tokenizer.control_ids)
            replies.append(numbers[number] if touches else 0)
        return Turns(ids, replies)

    def _owners(
        self, places: Sequence[tuple[int, int]], messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> list[int]:
        """The number of the reply that each marked place belongs to: a template may mark several of one."""
        replies = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if len(replies) == 1:
            return [1] * len(places)
        ends = [spans[-1][1] if (spans := self._said_by(messages, n, tools)) else 0 for n in replies]
        ends = list(itertools.accumulate(ends, max))
        return [min(bisect.bisect_right(ends, begin) + 1, len(replies)) for begin, _ in places]

    def _said_by(self, messages: Sequence[Mapping[str, Any]], number: int, tools: Sequence[Any] | None) -> Spans:
        """Places of what one message brings to the text of all, without those at the end that later messages repeat.

        So does a result of a tool that is headed by the name of what was called.
        """
        text, found = self._brought(messages, number, tools)
        if len(found) < 2 or number + 1 == len(messages):
            return found
        until, before = self._brought(messages[: number + 1], number, tools)
        own, pieces = [until[a:b] for a, b in before], [text[a:b] for a, b in found]
        while len(pieces) > 1 and 0 < own.count(pieces[-1]) < pieces.count(pieces[-1]):
            pieces.pop()
        return found[: len(pieces)]

    def _brought(
        self, messages: Sequence[Mapping[str, Any]], number: int, tools: Sequence[Any] | None
    ) -> tuple[str, Spans]:
        """The text of all messages, and places of what one of them brings."""

        def rendered(traced: Callable[[int | None], bool]) -> str:
            return self._template.render(messages, add_generation_prompt=False, tools=tools, traced=traced)

        text = rendered(functools.partial(operator.eq, number))
        found = said(text)
        if len(found) > 1:  # what is marked as safe HTML counts as said, whoever says it
            always = said(rendered(lambda number: False))
            found = tuple((a, b) for a, b in found if not any(begin <= a and b <= end for begin, end in always))
        return str.__str__(text), found

    def _replies(self, text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> Spans:
        """Begin and end of each reply, in the order of the assistant's messages."""
        plain, everything = str.__str__(text), said(text)
        found: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            own = self._said_by(messages, number, tools)
            if not own:
                raise ValueError(
                    f"the chat template writes nothing of message {number + 1}, which the assistant says: its content "
                    "is empty, or the template leaves it out"
                )
            begin, end = own[0][0], own[-1][1]
            before = max((e for _, e in everything if e <= begin), default=0)
            after = min((b for b, _ in everything if b >= end), default=len(plain))
            prompt = self._after(messages[:number], tools, prompt=True)
            # The prompt may go on with what the reply spells too, such as <think>.
            if plain.startswith(prompt, before) and before + len(prompt) <= end:
                begin = before + len(prompt)
            else:
                begin = min(begin, before + (self._common(prompt, plain[before:end]) or begin - before))
            closing = self._length_of_end(plain[end:after], lambda n=number: self._after(messages[: n + 1], tools))
            found.append((begin, end + closing))
        return tuple(found)

    def _after(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, *, prompt: bool = False
    ) -> str:
        """What the template writes behind the last thing that a message says; ``prompt``: with that for a reply."""
        text = self._template.render(messages, add_generation_prompt=prompt, tools=tools)
        spans = said(text)
        return str.__str__(text)[spans[-1][1] if spans else 0 :]

    def _common(self, prompt: str, text: str) -> int:
        """How much of a prompt a text begins with that goes on in another way, such as without the prompt's <think>.

        0 where they part before the last special token of the prompt, which then is that of another reply.
        """
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False))
        common = "".join(letter for letter, _ in same)
        length = len(common) - len(re.split(r"[\s>]", common)[-1])  # a piece that both only begin with is none
        return 0 if self._special.search(prompt, length) or not self._special.search(prompt) else length

    def _length_of_end(self, text: str, alone: Callable[[], str]) -> int:
        """How much of what follows a reply ends it: all to the first special token, or nothing where there is none.

        Special tokens right behind it are of the end too where the reply ends with them when nothing follows.
        """
        found = self._special.search(text)
        if found is None:
            return 0
        end = found.end()
        if self._special.match(text, end):
            last = alone()
            while (found := self._special.match(text, end)) and last.startswith(text[: found.end()]):
                end = found.end()
        return end

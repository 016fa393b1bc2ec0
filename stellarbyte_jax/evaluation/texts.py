"""Texts of tasks to ids, as lm-eval's backend for transformers (``hf``) makes them, so that scores are comparable."""

from collections.abc import Sequence
from typing import NamedTuple

from stellarbyte_jax.tokenizer.codec import Tokenizer


class Pair(NamedTuple):
    """Ids of what a continuation follows, and of the continuation; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class TextEncoder:
    """Ids of contexts and continuations.

    Special tokens that a text spells become control tokens: prompts of tasks and chat templates spell them on purpose.

    Attributes:
      prefix_id: what a text without a context follows: bos, or eos where the tokenizer has no bos.
    """

    def __init__(self, tokenizer: Tokenizer, *, add_bos: bool) -> None:
        """``add_bos`` says whether texts begin with bos; one that spells it at its beginning gets no second one.

        Raises:
          ValueError: the tokenizer has neither bos nor eos.
        """
        self.tokenizer = tokenizer
        self.prefix_id: int = tokenizer.require("eos") if tokenizer.bos_id is None else tokenizer.bos_id
        self._bos = [self.prefix_id] if add_bos and tokenizer.bos_id is not None else []
        self._spelled = tokenizer.decode([self.prefix_id], skip_special_tokens=False)

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Ids of a text, with bos where texts begin with it; ``begin`` False: of a text that goes on."""
        bos = self._bos if begin and not text.startswith(self._spelled) else []
        return bos + self.tokenizer.encode(text, parse_special=True)

    def pair(self, context: str, continuation: str) -> Pair:
        """Ids of a continuation that is scored behind its context.

        Spaces at the end of the context belong to the continuation, whose first word they begin. Both are encoded as
        one text, and what is longer than the context alone is the continuation.

        Raises:
          ValueError: no token is left of the continuation.
        """
        if context:
            kept = context.rstrip()
            before = self.encode(kept)
            after = self.encode(kept + context[len(kept) :] + continuation)[len(before) :]
        else:
            after = self.encode(continuation, begin=False)
            before = [self.prefix_id]
            if after[:1] == before:
                after = after[1:]
        return checked(before, after, continuation)


def checked(context: Sequence[int], continuation: Sequence[int], text: str) -> Pair:
    """The pair of these ids.

    Raises:
      ValueError: one of them is empty.
    """
    if not context or not continuation:
        what = "continuation" if context else "context"
        raise ValueError(
            f"the {what} of a request has no token (continuation {text[:40]!r}), so it has no likelihood: "
            "leave that document out of the task"
        )
    return Pair(tuple(context), tuple(continuation))

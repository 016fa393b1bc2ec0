"""Texts of tasks to ids, as lm-eval's backend for transformers (``hf``) makes them, so that scores are comparable."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from stellarbyte_jax.tokenizer.codec import Tokenizer

_T = TypeVar("_T")
_AT_ONCE = 1024  # texts that are encoded together: the library keeps much more of each than its ids


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
        self._bos = (self.prefix_id,) if add_bos and tokenizer.bos_id is not None else ()
        self._spelled = tokenizer.decode([self.prefix_id], skip_special_tokens=False)

    def encode(self, texts: Sequence[str], *, begin: bool = True) -> list[tuple[int, ...]]:
        """Ids of texts, with bos where texts begin with it; ``begin`` False: of texts that go on.

        Equal texts are encoded once and share their ids.
        """
        made: dict[str, tuple[int, ...]] = dict.fromkeys(texts, ())
        for part in _parts(list(made)):
            for text, ids in zip(part, self.tokenizer.encode_batch(part, parse_special=True), strict=True):
                bos = self._bos if begin and not text.startswith(self._spelled) else ()
                made[text] = (*bos, *ids)
        return [made[text] for text in texts]

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """Ids of continuations that are scored behind their contexts, ``(context, continuation)``.

        Spaces at the end of a context belong to the continuation, whose first word they begin. Both are encoded as
        one text, and what is longer than the context alone is the continuation.

        Raises:
          ValueError: no token is left of a continuation.
        """
        contexts = self.encode([context.rstrip() for context, _ in requests])
        pairs = []
        for part, before in zip(_parts(requests), _parts(contexts), strict=True):
            wholes = iter(self.encode([context + text for context, text in part if context]))
            alone = iter(self.encode([text for context, text in part if not context], begin=False))
            for (context, text), ids in zip(part, before, strict=True):
                if context:
                    pairs.append(checked(ids, next(wholes)[len(ids) :], text))
                else:
                    after = next(alone)
                    pairs.append(checked((self.prefix_id,), after[after[:1] == (self.prefix_id,) :], text))
        return pairs


def _parts(everything: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for at in range(0, len(everything), _AT_ONCE):
        yield everything[at : at + _AT_ONCE]


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

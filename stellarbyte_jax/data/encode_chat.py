"""Conversations to token ids and what of them is learnt, in worker processes."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from stellarbyte_jax.config import ChatConfig
from stellarbyte_jax.data.conversations import ConversationFormat, Dialogue
from stellarbyte_jax.data.encode import Encoded
from stellarbyte_jax.data.files import BadRecordError, DataError
from stellarbyte_jax.data.sources import Corpus, LineSource
from stellarbyte_jax.data.text import UnusableRecordError, unusable
from stellarbyte_jax.tokenizer.codec import Tokenizer, load_tokenizer
from stellarbyte_jax.tokenizer.template import ChatTemplate
from stellarbyte_jax.tokenizer.turns import TurnEncoder

_SKIP = "data.on_error=skip"


def template_source(chat: ChatConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """The chat template, and where it is from.

    Raises:
      DataError: there is none, or its file cannot be read.
    """
    if chat.template is not None:
        try:
            return Path(chat.template).read_text(encoding="utf-8"), chat.template
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise DataError(f"data.chat.template={chat.template} cannot be read: {why}; name a file in Jinja") from None
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer in {tokenizer.path} has no chat template, which makes texts of conversations: name a file "
            "in Jinja with data.chat.template, or copy a tokenizer_config.json with a chat_template there"
        )
    return tokenizer.chat_template, tokenizer.path


_Fate = Literal["skipped", "shortened", "left_out"]


@dataclass(frozen=True)
class _Made:
    """A conversation in tokens, none where it is left out, and what became of it where something did."""

    tokens: np.ndarray
    replies: np.ndarray
    fate: _Fate | None

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.replies.nbytes


def _arrays(ids: Sequence[int], replies: Sequence[int], fate: _Fate | None) -> _Made:
    return _Made(np.array(ids, np.int32), np.array(replies, np.int32), fate)


@dataclass(frozen=True)
class EncodeConversations:
    """Conversation numbers to one group, as ``encode.EncodeDocuments`` makes them of texts.

    ``lengths`` int64 has an entry for each number, 0 for what is left out. ``replies`` int32 [n] says of each token
    which reply it belongs to, from 1, 0 for none and -1 for one that is not learnt. ``skipped`` counts unusable lines,
    ``shortened`` conversations that lost their last turns, and ``left_out`` those of which nothing fits.
    """

    corpus: Corpus
    chat: ChatConfig
    tokenizer: str
    sequence_length: int
    on_error: Literal["raise", "skip"] = "raise"
    _encoded: Encoded[_Made] = field(default_factory=Encoded, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _encoder.cache_clear()  # files of the same names may have been made again

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Reads the conversations and tokenises them.

        Raises:
          DataError: a record is unusable and ``on_error`` is "raise", or a file became shorter.
        """
        made: dict[int, _Made] = {}
        for number in dict.fromkeys(numbers):
            made[number] = self._encoded.get(number) or self._read(number)
        self._encoded.keep(made)
        found = [made[number] for number in numbers]
        empty = np.zeros(0, np.int32)
        return {
            "tokens": np.concatenate([empty, *(one.tokens for one in found)]),
            "replies": np.concatenate([empty, *(one.replies for one in found)]),
            "lengths": np.array([len(one.tokens) for one in found], np.int64),
            **{fate: sum(one.fate == fate for one in found) for fate in get_args(_Fate)},
        }

    def _read(self, number: int) -> _Made:
        try:
            return self._made(number)
        except UnusableRecordError:
            if self.on_error == "raise":
                raise
            return _arrays([], [], "skipped")

    def check(self, number: int) -> None:
        """Reads one conversation.

        Raises:
          UnusableRecordError: it is unusable.
        """
        self._made(number)

    def _made(self, number: int) -> _Made:
        source, row = self.corpus.locate(number)
        if not isinstance(source, LineSource):
            raise DataError(
                f"{source.name} holds no conversations, which data.format=chat reads of .jsonl, .parquet or .arrow "
                "files (tokens that are prepared do not say who speaks): name such files"
            )
        try:
            return self._shortened(ConversationFormat(self.chat.field).dialogue(source.value(row)))
        except BadRecordError as error:
            raise unusable(source, row, error, _SKIP) from error
        except ValueError as error:  # of the template
            raise unusable(source, row, BadRecordError(str(error)), _SKIP) from error

    def _shortened(self, dialogue: Dialogue) -> _Made:
        """A conversation that fits, or what is left of it."""
        messages, limit = dialogue.messages, self.sequence_length
        ids, replies = self._turns(dialogue, messages)
        if max(replies, default=0) < 1:
            raise BadRecordError(
                'nothing is to be learnt: each reply has "weight": 0, or is not the last (data.chat.replies=last)'
                if any(replies)
                else "the chat template marks nothing of what is to be learnt with {% generation %}"
            )
        if len(ids) <= limit:
            return _arrays(ids, replies, None)
        if self.chat.too_long == "raise":
            raise BadRecordError(
                f"{len(ids)} tokens are more than data.sequence_length={limit}: raise that, or "
                "data.chat.too_long=shorten leaves out the last turns"
            )
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        for last in reversed(answers[:-1]) if self.chat.too_long == "shorten" else ():
            ids, replies = self._turns(dialogue, messages[: last + 1])
            if len(ids) <= limit and max(replies) > 0:
                return _arrays(ids, replies, "shortened")
        return _arrays([], [], "left_out")

    def _turns(self, dialogue: Dialogue, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        turns = _encoder(self.tokenizer, self.chat).encode(messages, dialogue.tools)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        learnt = {turn for turn, n in enumerate(answers, 1) if n not in dialogue.silent}
        if self.chat.replies == "last":
            learnt &= {len(answers)}
        return turns.ids, [reply if reply in learnt or not reply else -1 for reply in turns.replies]


@functools.lru_cache(maxsize=2)
def _encoder(tokenizer: str, chat: ChatConfig) -> TurnEncoder:
    loaded = load_tokenizer(tokenizer)
    source, where = template_source(chat, loaded)
    return TurnEncoder(loaded, ChatTemplate(source, loaded.special_tokens, where))

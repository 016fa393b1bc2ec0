"""What a record is to a run: a text, or a conversation. The loader asks nothing else of ``data.format``."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import grain

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.data.batches import DocumentBatches
from stellarbyte_jax.data.contiguous import ContiguousDocuments
from stellarbyte_jax.data.encode import EncodeDocuments
from stellarbyte_jax.data.encode_chat import EncodeConversations, template_source
from stellarbyte_jax.data.files import DataError
from stellarbyte_jax.data.packing import PackDocuments
from stellarbyte_jax.data.sources import Corpus, ShardSource
from stellarbyte_jax.data.text import TextFormat, read_text
from stellarbyte_jax.data.whole import WholeConversations
from stellarbyte_jax.tokenizer.codec import Tokenizer
from stellarbyte_jax.tokenizer.template import ChatTemplate


class Records(Protocol):
    """How documents of a kind are read, checked, encoded and put into rows."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Fields of texts that are read of a record; None: any, of any type."""
        ...

    def check_first(self, corpus: Corpus) -> None:
        """Reads a record of each file; DataError where one is unusable."""
        ...

    def encoder(self, corpus: Corpus) -> Any:
        """What makes a group of document numbers, see ``encode``."""
        ...

    def rows(self, groups: grain.MapDataset, train: bool, **shape: Any) -> DocumentBatches:
        """Batches of the groups."""
        ...

    def stream(self) -> dict[str, Any]:
        """What the meaning of a place in the data depends on."""
        ...


@dataclass(frozen=True)
class TextRecords:
    """Texts, of which every token but the first is to be predicted."""

    data: DataConfig
    tokenizer: Tokenizer

    @cached_property
    def format(self) -> TextFormat:
        """How a record becomes text."""
        return TextFormat(self.data.fields, self.data.template)

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of the text."""
        return self.format.columns

    def check_first(self, corpus: Corpus) -> None:
        """Reads a record of each file; DataError where one is unusable."""
        for source in corpus.sources:
            if not isinstance(source, ShardSource):
                read_text(source, 0, self.format)

    def encoder(self, corpus: Corpus) -> EncodeDocuments:
        """Texts to ids, with bos and eos as the settings say."""
        return EncodeDocuments(
            corpus,
            self.format,
            self.data.tokenizer,
            bos=self.tokenizer.require("bos") if self.data.add_bos else None,
            eos=self.tokenizer.require("eos") if self.data.add_eos else None,
            on_error=self.data.on_error,
        )

    def rows(self, groups: grain.MapDataset, train: bool, **shape: Any) -> DocumentBatches:
        """Rows that are packed, or that go on from batch to batch."""
        del train
        arrangement = {"packed": PackDocuments, "contiguous": ContiguousDocuments}[self.data.arrangement]
        return arrangement(groups, **shape)

    def stream(self) -> dict[str, Any]:
        """Its fields or template, and its ends."""
        return {
            "fields": list(self.columns),
            "template": self.data.template,
            "add_bos": self.data.add_bos,
            "add_eos": self.data.add_eos,
        }


@dataclass(frozen=True)
class ChatRecords:
    """Conversations, of which the assistant's replies are to be predicted."""

    data: DataConfig
    tokenizer: Tokenizer

    @property
    def columns(self) -> None:
        """Any: which ones hold a conversation, each record says."""

    def check_first(self, corpus: Corpus) -> None:
        """Reads a record of each file; DataError where one is unusable."""
        encoder, at = self.encoder(corpus), 0
        for source in corpus.sources:
            encoder.check(at)
            at += source.documents

    def encoder(self, corpus: Corpus) -> EncodeConversations:
        """Conversations to ids and replies; DataError or ValueError where there is no template, or a broken one."""
        source, where = template_source(self.data.chat, self.tokenizer)
        ChatTemplate(source, self.tokenizer.special_tokens, where)  # a broken one is no fault of a line
        d = self.data
        return EncodeConversations(corpus, d.chat, d.tokenizer, d.sequence_length, on_error=d.on_error)

    def rows(self, groups: grain.MapDataset, train: bool, **shape: Any) -> DocumentBatches:
        """Rows of whole conversations. Validation is of replies alone."""
        return WholeConversations(groups, prompts=train and self.data.chat.prompt_weight > 0, **shape)

    def stream(self) -> dict[str, Any]:
        """Its field, and its template."""
        source, _ = template_source(self.data.chat, self.tokenizer)
        chat = self.data.chat
        return {
            "field": chat.field,
            "chat_template": hashlib.sha256(source.encode()).hexdigest()[:16],
            "replies": chat.replies,
            "too_long": chat.too_long,
        }


def records_of(data: DataConfig, tokenizer: Tokenizer) -> Records:
    """What ``data.format`` names."""
    return ChatRecords(data, tokenizer) if data.format == "chat" else TextRecords(data, tokenizer)


def no_target(data: DataConfig) -> DataError:
    """The error for validation data without anything to predict."""
    what, why = ("reply", "too long") if data.format == "chat" else ("token", "one token long")
    return DataError(
        f"data.validation={listed(data.validation)} holds no {what} to predict: its documents are empty, {why} or "
        "skipped; name other files, or none, and leave the settings of evaluation and keep_best out"
    )

"""What a run reads: documents or conversations, and how they become rows of tokens."""

from dataclasses import dataclass, field
from typing import Literal

from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share, require


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Section):
    """Conversations, of which a model learns what the assistant says.

    Attributes:
      field: field of a record that holds the messages; none: the first of those that are usual (messages,
        conversations, instruction and output, and more)
      template: file of the chat template, in Jinja; none: the tokenizer's
      replies: of the assistant's: all of a conversation are learnt, or the last
      prompt_weight: weight in the loss of a token that is not the assistant's, where one of its own has 1
      too_long: what becomes of a conversation of more than sequence_length tokens: shorten leaves out its last turns,
        whole ones, and the conversation where the first does not fit; skip leaves it out; raise ends the run. What is
        left out is counted in the log
    """

    field: str | None = None
    template: str | None = None
    replies: Literal["all", "last"] = "all"
    prompt_weight: Share = 0.0
    too_long: Literal["shorten", "skip", "raise"] = "shorten"

    _paths = ("template",)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Documents, and how they become [batch, sequence_length] arrays.

    Attributes:
      train: paths or globs of .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow or .txt files, or of directories
        of prepared shards or of a data set of Hugging Face datasets (save_to_disk)
      weights: share of each entry of train among the documents that are read, whose entries are each repeated as
        often as that needs; none: all are read once an epoch
      validation: the same as train, of texts to validate with; none: no validation
      format: what a record is: text, which is learnt whole; chat: a conversation, of which what the assistant says is
        learnt
      tokenizer: directory of the tokenizer, or owner/name of the hub
      text_documents: what a document of a .txt file is: the file, or each paragraph, which blank lines part
      fields: fields of a record that are its text, joined by a newline
      template: text of a record, such as "Question: {question} Answer: {answer}"; none: fields are joined
      sequence_length: tokens of a row
      arrangement: packed: each row holds what comes next, and whole conversations; contiguous: row b continues row
        b of the batch before, which memory needs
      add_bos: texts begin with the token bos; of conversations the template says it
      add_eos: texts end with the token eos; likewise
      max_documents_per_sequence: a row that would hold more documents is closed early and padded
      shuffle: documents come in another order each epoch
      epochs: times that each document is read; none: as many as the steps need
      on_error: what a bad line does: raise ends the run, skip leaves it out and counts it in the log
      workers: processes that tokenize; 0: the training process does; batches do not depend on it
      prefetch: batches prepared ahead of the device
      cache_dir: directory of decompressed files and line indexes; none: ~/.cache/stellarbyte_jax
      chat: conversations
    """

    train: tuple[str, ...] = ()
    weights: tuple[PositiveFloat, ...] = ()
    validation: tuple[str, ...] = ()
    format: Literal["text", "chat"] = "text"
    tokenizer: str = "tokenizer"
    text_documents: Literal["file", "paragraph"] = "file"
    fields: tuple[str, ...] = ("text",)
    template: str | None = None
    sequence_length: PositiveInt = 1024
    arrangement: Literal["packed", "contiguous"] = "packed"
    add_bos: bool = True
    add_eos: bool = True
    max_documents_per_sequence: PositiveInt = 16
    shuffle: bool = True
    epochs: PositiveInt | None = None
    on_error: Literal["raise", "skip"] = "raise"
    workers: NonNegativeInt = 1
    prefetch: PositiveInt = 2
    cache_dir: str | None = None
    chat: ChatConfig = field(default_factory=ChatConfig)

    _paths = ("train", "validation", "tokenizer", "cache_dir")

    def _check(self) -> None:
        require(self.sequence_length >= 2, "data.sequence_length must be at least 2: one token predicts the next")
        require(len(self.fields) > 0, "data.fields must name at least one field")
        require(
            self.template is None or "fields" not in self.given(),
            "data.template names the fields that it reads itself: leave data.fields out",
        )
        require(
            not self.weights or len(self.weights) == len(self.train),
            f"data.weights has {len(self.weights)} numbers and data.train {len(self.train)} entries: give one a piece",
        )
        require(
            not self.weights or self.epochs is None,
            "data.weights repeats each entry of data.train as often as its share needs: leave data.epochs out",
        )
        if self.format == "text":
            given = sorted(self.chat.given())
            require(not given, f"data.chat.{listed(given)} would change nothing: set data.format=chat too")
            return
        of_text = sorted({"fields", "template", "text_documents"} & set(self.given()))
        require(not of_text, f"data.{listed(of_text)} is of texts, and data.format is chat: leave it out")
        require(
            self.arrangement == "packed",
            "data.arrangement=contiguous cuts documents, and conversations are kept whole: use packed",
        )

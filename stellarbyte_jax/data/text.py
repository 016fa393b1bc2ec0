"""Documents to token ids: fields and templates, and tokenising in worker processes."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import string
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from stellarbyte_jax.data.sources import BadRecordError, Corpus, DataError, LineSource, ShardSource
from stellarbyte_jax.data.tokenizer import load_tokenizer

# Documents that travel between processes together: enough to hide the cost of a message, few enough that a resume,
# which tokenises the group in hand again, is quick.
GROUP_DOCUMENTS = 32


@dataclass(frozen=True)
class TextFormat:
    """How a record becomes text: ``template.format(**record)``, or ``fields`` joined by a newline."""

    fields: tuple[str, ...] = ("text",)
    template: str | None = None

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The fields that are read.

        Raises:
          DataError: the template is malformed or names no field.
        """
        if self.template is None:
            return self.fields
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise DataError(
                f"data.template {self.template!r}: {error}; write {{{{ and }}}} for literal braces"
            ) from error
        wrong = [name for name in names if not name.isidentifier()]
        if wrong or not names:
            raise DataError(
                f"data.template {self.template!r} must name fields as {{field}}"
                + (f", {{{wrong[0]}}} is not a field name; write {{{{ and }}}} for literal braces" if wrong else "")
            )
        return tuple(dict.fromkeys(names))

    def render(self, record: Mapping[str, Any]) -> str:
        """The text of a record.

        Raises:
          BadRecordError: a field is missing, is not a string or holds a lone surrogate.
        """
        values: dict[str, str] = {}
        for name in self.columns:
            if name not in record:
                present = ", ".join(record) or "none"
                raise BadRecordError(f"no field {name!r}; the fields here are: {present}; see data.fields")
            value = record[name]
            if not isinstance(value, str):
                raise BadRecordError(f"field {name!r} must be a string, it is {type(value).__name__}")
            values[name] = value
        text = "\n".join(values.values()) if self.template is None else self.template.format_map(values)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecordError(f"half of a surrogate pair at character {error.start + 1} of the text") from error
        return text


@dataclass(frozen=True)
class EncodeDocuments:
    """Document numbers to one group: ``tokens`` int32 [n], ``lengths`` int64 [documents], ``skipped`` int.

    Documents without any text are left out, as blank lines are. The tokenizer travels to workers as a path.
    """

    corpus: Corpus
    text: TextFormat
    tokenizer: str
    bos: int | None  # None: not added
    eos: int | None
    on_error: Literal["raise", "skip"] = "raise"

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Reads and tokenises the documents.

        Raises:
          DataError: a record is unusable and ``on_error`` is "raise".
        """
        documents: list[Any] = []
        texts: list[str] = []
        text_at: list[int] = []
        skipped = 0
        for number in numbers:
            source, row = self.corpus.locate(number)
            if isinstance(source, ShardSource):
                documents.append(source.tokens(row))
                continue
            try:
                text = read_text(source, row, self.text)
            except DataError:
                if self.on_error == "raise":
                    raise
                skipped += 1
                continue
            texts.append(text)
            text_at.append(len(documents))
            documents.append(None)
        if texts:
            tokenizer = _tokenizer(self.tokenizer)
            for at, ids in zip(text_at, tokenizer.encode_batch(texts), strict=True):
                documents[at] = np.array(ids, np.int32)
        documents = [ids for ids in documents if len(ids)]
        before = np.array([self.bos] if self.bos is not None else [], np.int32)
        after = np.array([self.eos] if self.eos is not None else [], np.int32)
        parts = [part for ids in documents for part in (before, ids, after)]
        tokens = np.concatenate(parts, dtype=np.int32, casting="same_kind") if parts else np.zeros(0, np.int32)
        lengths = np.array([len(ids) for ids in documents], np.int64) + (len(before) + len(after))
        return {"tokens": tokens, "lengths": lengths, "skipped": skipped}


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    return load_tokenizer(path)


def read_text(source: LineSource, row: int, text: TextFormat) -> str:
    """The text of one record.

    Raises:
      DataError: the record is unusable; names file, line and column or field.
    """
    try:
        return text.render(source.record(row))
    except BadRecordError as error:
        raise DataError(
            f"{source.where(row, error.column)}: {error}; mend the line or leave such lines out with data.on_error=skip"
        ) from error


def document_groups(
    count: int, *, seed: int | None = None, epochs: int | None = 1, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Groups of document numbers in reading order: a random access dataset of lists of ints.

    Args:
      count: how many documents there are.
      seed: of the shuffle, which differs from epoch to epoch; None: in order.
      epochs: how often each document comes; None: endless.
      process_index: every ``process_count``-th document from here belongs to this process.
      process_count: how many processes share the documents.
    """
    documents = grain.MapDataset.range(count)
    if seed is not None:
        documents = documents.shuffle(seed=seed % 2**32)
    documents = documents.repeat(epochs)
    if process_count > 1:
        documents = documents[process_index::process_count]
    return documents.batch(GROUP_DOCUMENTS, batch_fn=list)


def iterate_groups(groups: grain.MapDataset, workers: int) -> grain.DatasetIterator[Any]:
    """Iterates over a dataset whose elements are made in ``workers`` processes (0: in this thread), in its order.

    The result's ``close()`` ends the workers; they end by themselves when this process dies.
    """
    _set_up_grain()
    stream = groups.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # Pipes, not shared memory: containers often have little of it, and a killed run would leave it allocated.
    stream = grain.experimental.WithOptionsIterDataset(stream, grain.experimental.DatasetOptions(min_shm_size=1 << 62))
    workers = min(workers, len(groups))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
        stream = stream.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(stream)


def _set_up_grain() -> None:
    # Grain reads command line flags of absl, which raise where a program does not use absl for its command line.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
        # Otherwise every thread that an error passes through adds a paragraph about hidden frames to it.
        grain.config.update("py_traceback_filtering", "off")


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes and threads started inside never see SIGINT and SIGTERM: stopping is the parent's decision.

    Ignoring them in the worker would come too late: a signal during its start would print a traceback.
    """
    # Starting this helper process, which Python does with the first worker, would lift the block again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    # One thread a worker: the setting for how many cores are used is data.workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def token_byte_lengths(path: str | Path) -> np.ndarray:
    """UTF-8 bytes of text that each token id stands for, int32 [vocabulary]; special tokens count 0.

    Args:
      path: the tokenizer's directory.

    Raises:
      DataError: the tokenizer is not byte-level, so that a token has no fixed number of bytes.
    """
    file = Path(path) / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    decoder = settings.get("decoder") or {}
    kinds = {decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))}
    if "ByteLevel" not in kinds:
        raise DataError(f"{file}: bytes per token need a byte-level tokenizer, its decoder is {decoder.get('type')}")
    added = {token["id"]: token for token in settings.get("added_tokens", [])}
    vocabulary: dict[str, int] = settings["model"]["vocab"]
    lengths = np.zeros(max([*vocabulary.values(), *added]) + 1, np.int32)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # byte-level vocabularies spell each byte as one character
    for number, token in added.items():
        lengths[number] = 0 if token["special"] else len(token["content"].encode())
    return lengths

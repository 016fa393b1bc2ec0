"""From the data settings to batches: one object that iterates, remembers its place and can be closed."""

import contextlib
import hashlib
import json
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import grain

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.config.foreign import digits, listed, shown
from stellarbyte_jax.data.encode import GROUP_DOCUMENTS, document_groups, iterate_groups
from stellarbyte_jax.data.patterns import expand
from stellarbyte_jax.data.records import no_target, records_of
from stellarbyte_jax.data.sources import DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.tokenizer.codec import check_vocabulary, load_tokenizer

_log = logging.getLogger(__name__)

_STATE_FORMAT = 1
_TEXT = ("fields", "template")  # of a state: together they say what a text is, which may be spelled in several ways
_COUNTS = {
    "skipped": "skipped_lines",
    "shortened": "shortened_conversations",
    "left_out": "left_out_conversations",
}
_EARLIER: dict[str, Any] = {"format": "text", "weights": []}  # of states that are older than these settings


class Loader:
    """Iterates over batches that a background thread keeps ready, see ``packing`` and ``contiguous``.

    The place that ``state`` gives belongs to the batches handed out, not to those prepared ahead.

    Attributes:
      pass_batches: how many batches a validation loader has, where it once came to its end.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        *,
        stream: dict[str, Any],
        files: list[str],
        documents: int,
        has_text: bool,
        prefetch: int,
        transform: Callable[[dict[str, Any]], Any] | None,
        restart: bool,
    ):
        """Made by :func:`make_loader`."""
        if transform is not None:
            batches = batches.map(transform)
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
        self._open = [iter(batches)]
        # Where a program ends without close(), the iterator must be closed and gone before the modules that it needs.
        self._finalizer = weakref.finalize(self, _close, self._open)
        self._stream = stream
        self._files = files
        self._documents = documents
        self._has_text = has_text
        self._restart = restart
        self._begin = self._iterator.get_state()
        self._moved = False
        self._handed = 0
        self.pass_batches: int | None = None

    @property
    def _iterator(self) -> Any:
        if not self._open:
            raise RuntimeError("the loader is closed")
        return self._open[0]

    def __iter__(self) -> Self:
        """Itself; a validation loader goes back to its first batch."""
        if self._restart and self._moved:
            self._iterator.set_state(self._begin)
            self._moved, self._handed = False, 0
        return self

    def __next__(self) -> Any:
        """The next batch, after ``transform``."""
        self._moved = True
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.pass_batches = self._handed if self._restart else None
            raise
        self._handed += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The place after the last batch handed out, as plain JSON values; that of all processes."""
        return {"format": _STATE_FORMAT, "stream": dict(self._stream), **self._iterator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues with the batch that followed when ``state`` was taken; the number of workers may differ.

        Raises:
          DataError: the state is of other data, or of a run that reads it in another order.
        """
        if state.get("format") != _STATE_FORMAT:
            raise DataError(f"data state of format {shown(state.get('format'))}, this version reads {_STATE_FORMAT}")
        saved = state["stream"]
        if saved.get("process_count", 1) != 1:
            raise DataError(
                f"cannot continue the data where it stopped: {shown(saved['process_count'])} processes had parts of "
                "it, as an earlier version dealt them out, and now all follow one order; start a new run with "
                "init_from=RUN, which keeps the weights"
            )
        for name, now in self._stream.items():
            if name == "contents":  # older states have none
                if (other := self.changed(saved.get(name, now))) is not None:
                    raise DataError(
                        f"cannot continue the data where it stopped: {other}; put them back as they were, or start a "
                        "new run"
                    )
                continue
            before = saved.get(name, _EARLIER.get(name))
            if before != now and not (name in _TEXT and _text(saved) == _text(self._stream)):
                say = digits if name == "tokenizer" else shown
                raise DataError(
                    f"cannot continue the data where it stopped: {name} was {say(before)} and is now "
                    f"{say(now)}; keep the data and its settings as they were, or start a "
                    "new run"
                )
        self._iterator.set_state({name: value for name, value in state.items() if name not in ("format", "stream")})
        self._moved = True

    @property
    def has_text(self) -> bool:
        """Whether there is text, which is tokenized while it is read."""
        return self._has_text

    @property
    def contents(self) -> list[list[str]]:
        """Name of each file, without its folder, and a hash of its content."""
        return self._stream["contents"]

    def changed(self, before: list[list[str]]) -> str | None:
        """Which files hold something else than when ``contents`` was ``before``, in words; None where none does."""
        if [content for _, content in before] == [content for _, content in self.contents]:
            return None
        names = [[name for name, _ in contents] for contents in (before, self.contents)]
        if names[0] != names[1]:
            return f"the files were {listed(names[0])} and are now {listed(names[1])}"
        both = zip(self._files, before, self.contents, strict=True)
        changed = [path for path, was, now in both if was != now]
        return f"{listed(changed)}: other content than before (the size, beginning or end differs)"

    @property
    def skipped(self) -> int:
        """Unusable lines that ``on_error="skip"`` left out so far."""
        return self._iterator.get_state()["skipped"]

    @property
    def counts(self) -> dict[str, int]:
        """What was not read as it is so far, by the name of its metric: unusable lines, and conversations too long."""
        state = self._iterator.get_state()
        return {metric: state[name] for name, metric in _COUNTS.items() if state.get(name)}

    @property
    def epoch(self) -> float:
        """How often the data was gone through so far."""
        return self._iterator.get_state()["group"] * GROUP_DOCUMENTS / self._documents

    def close(self) -> None:
        """Ends the thread and the worker processes."""
        self._finalizer()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def _close(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


def _text(stream: dict[str, Any]) -> Any:
    """What a record's text is, as a state spells it; None where it is of no use."""
    try:
        return TextFormat(tuple(stream["fields"]), stream["template"]).meaning
    except (DataError, KeyError, TypeError, AttributeError):
        return None


def make_loader(
    data: DataConfig,
    *,
    split: Literal["train", "validation"],
    batch_size: int,
    seed: int,
    vocab_size: int | None = None,
    transform: Callable[[dict[str, Any]], Any] | None = None,
) -> Loader:
    """Opens the data, checks all that can be checked before training, and returns its loader.

    The training split is shuffled anew each epoch and tokenised in ``data.workers`` processes (none where all of it
    is prepared). The validation split is read once, in order, in the background thread, so that a pass starts at once.

    Args:
      data: the settings.
      split: which of the two.
      batch_size: rows. Where several processes train, each makes all of them, and its devices take theirs.
      seed: of the shuffle.
      vocab_size: of the model; a larger tokenizer is refused.
      transform: applied to each batch in the background thread, such as a transfer to the device.

    Raises:
      DataError: files are missing, empty or damaged, the first record of one is unusable, validation holds no token to
        predict, or settings do not fit.
      ValueError: the tokenizer is unusable, lacks bos or eos, or is larger than ``vocab_size``.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size)
    train = split == "train"
    records = records_of(data, tokenizer)
    corpus = open_corpus(
        data.train if train else data.validation,
        setting=f"data.{split}",
        columns=records.columns,
        fingerprint=tokenizer.fingerprint,
        text_documents=data.text_documents,
        cache_dir=data.cache_dir,
    )
    if not train:
        _tell_overlap(data)
    if data.on_error == "raise":
        records.check_first(corpus)
    shuffle = data.shuffle and train
    groups = document_groups(
        len(corpus),
        seed=seed if shuffle else None,
        epochs=data.epochs if train else 1,
        parts=corpus.parts,
        weights=data.weights if train else (),
    )
    encoded = groups.map(records.encoder(corpus))
    if not train:
        check_targets(encoded, data)
    batches = records.rows(
        encoded,
        train,
        batch_size=batch_size,
        sequence_length=data.sequence_length,
        max_documents=data.max_documents_per_sequence,
        # Tokenizers of other projects often have no pad token; any id will do, as nothing attends to segment 0.
        pad=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
        workers=data.workers if train and corpus.has_text else 0,
        epoch_groups=-(-len(corpus) // GROUP_DOCUMENTS),
    )
    if train and data.arrangement == "contiguous":
        _tell_few_documents(len(corpus), batch_size)
    contents = corpus.contents
    stream = {
        "contents": [[Path(path).name, content] for path, content in contents],
        "arrangement": data.arrangement,
        "documents": len(corpus),
        "files": hashlib.sha256(json.dumps(corpus.listing).encode()).hexdigest()[:16],
        "shuffle_seed": seed if shuffle else None,
        "tokenizer": tokenizer.fingerprint,
        **records.stream(),
        "group_documents": GROUP_DOCUMENTS,
        "format": data.format,
        "weights": list(data.weights) if train else [],
    }
    if corpus.has_plain:  # states that are older than the setting have none
        stream["text_documents"] = data.text_documents
    return Loader(
        batches,
        stream=stream,
        files=[path for path, _ in contents],
        documents=len(corpus),
        has_text=corpus.has_text,
        prefetch=data.prefetch,
        transform=transform,
        restart=not train,
    )


def _tell_overlap(data: DataConfig) -> None:
    """Logs which files of the validation are trained on."""
    trained = {path.resolve() for pattern in data.train for path in expand(pattern, "data.train")}
    both = [p for pattern in data.validation for p in expand(pattern, "data.validation") if p.resolve() in trained]
    if both:
        _log.warning(
            "warning: %s is in both data.train and data.validation, so that the validation loss falls with what is "
            "learnt by heart: move it out of what data.train names, such as data.train='corpus/train/*.jsonl' "
            "data.validation=corpus/valid.jsonl",
            listed(both),
        )


def _tell_few_documents(documents: int, rows: int) -> None:
    """Logs that rows which follow documents of their own will hold equal text."""
    if documents < rows:
        _log.warning(
            "warning: data.train holds %d documents for %d rows, and with data.arrangement=contiguous each row follows "
            "one: rows hold the same text at the same time; use smaller documents (of .txt: "
            "data.text_documents=paragraph) or data.arrangement=packed",
            documents,
            rows,
        )


def check_targets(groups: grain.MapDataset, data: DataConfig) -> None:
    """Reads on to the first document with a token to predict, which is nearly always among the first few.

    Raises:
      DataError: there is none.
    """
    with contextlib.closing(iterate_groups(groups, workers=0)) as made:
        if not any((group["lengths"] > 1).any() for group in made):
            raise no_target(data)


def measure_loader(data: DataConfig, *, batch_size: int, seconds: float) -> dict[str, float]:
    """Speed of the training data alone, from its second batch on.

    Returns:
      ``tokens_per_second`` (padding not counted), ``first_batch_seconds``, ``batches`` and ``padding``, the share
      of positions that hold none.
    """
    opened = time.perf_counter()
    with make_loader(data, split="train", batch_size=batch_size, seed=0) as loader:
        batches: Iterator[Any] = iter(loader)
        next(batches)
        began = time.perf_counter()
        count = tokens = 0
        for batch in batches:
            count += 1
            tokens += int((batch["segment_ids"] > 0).sum())
            if time.perf_counter() - began >= seconds:
                break
        took = time.perf_counter() - began
    positions = max(count, 1) * batch_size * data.sequence_length
    return {
        "tokens_per_second": tokens / took,
        "first_batch_seconds": began - opened,
        "batches": count,
        "padding": 1 - tokens / positions,
    }

"""Tokenises text once, into shards that are read without any further work."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from stellarbyte_jax.command import directory_for, remedy
from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.data.encode import GROUP_DOCUMENTS, EncodeDocuments, document_groups, iterate_groups
from stellarbyte_jax.data.files import write_array
from stellarbyte_jax.data.sources import SHARD_FORMAT, SHARD_META, DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.tokenizer.codec import load_tokenizer

_PLACE = "output directory"


@dataclass(frozen=True)
class Shard:
    """One pair of files: ``token_file`` [tokens] unsigned, ``offset_file`` [documents + 1] int64."""

    token_file: str
    offset_file: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` wrote, as in ``meta.json``."""

    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    skipped: int
    dtype: str


def prepare(
    inputs: Sequence[str],
    output: str | Path,
    tokenizer: str,
    *,
    text: TextFormat,
    workers: int = 1,
    on_error: Literal["raise", "skip"] = "raise",
    text_documents: Literal["file", "paragraph"] = "file",
    shard_tokens: int = 50_000_000,
    overwrite: bool = False,
    cache_dir: str | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Prepared:
    """Tokenises documents in their order into a directory that ``data.train`` may name.

    ``meta.json`` comes last: a directory without it was interrupted and is refused by the loader. A call that fails
    leaves no directory that it made, and with ``overwrite`` what was there where it had written no shard yet.

    Args:
      inputs: paths or globs of text files.
      output: the directory, new or empty.
      tokenizer: the tokenizer's directory.
      text: how a record becomes text.
      workers: processes that tokenise; 0: this one.
      on_error: "skip" leaves unusable lines out and counts them.
      text_documents: what a document of a .txt file is.
      shard_tokens: a shard is closed when it holds at least so many.
      overwrite: replaces what an earlier run left in the directory.
      cache_dir: as ``data.cache_dir``.
      progress: called with documents and tokens so far and the number of all documents.

    Raises:
      DataError: the directory is not empty or cannot be written, a number is out of range, an input is unusable or none
        holds text.
      ValueError: the tokenizer is unusable.
    """
    if shard_tokens <= 0:
        raise DataError(f"shard_tokens must be positive, got {shard_tokens}")
    if workers < 0:
        raise DataError(f"data.workers must not be negative, got {workers}")
    vocabulary = load_tokenizer(tokenizer)
    corpus = open_corpus(
        inputs,
        setting="inputs",
        columns=text.columns,
        fingerprint=vocabulary.fingerprint,
        text_documents=text_documents,
        cache_dir=cache_dir,
    )
    dtype = np.dtype(np.uint16 if vocabulary.vocab_size <= 1 << 16 else np.uint32)
    encode = EncodeDocuments(corpus, text, tokenizer, bos=None, eos=None, on_error=on_error)
    held: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    held_tokens = tokens = skipped = read = 0
    with (
        _Output.opened(Path(output), overwrite) as out,
        contextlib.closing(iterate_groups(document_groups(len(corpus)).map(encode), workers)) as groups,
    ):
        for group in groups:
            held.append(group["tokens"].astype(dtype))
            lengths.append(group["lengths"])
            held_tokens += len(group["tokens"])
            tokens += len(group["tokens"])
            skipped += group["skipped"]
            read = min(read + GROUP_DOCUMENTS, len(corpus))
            if held_tokens >= shard_tokens:
                out.write(held, lengths)
                held, lengths, held_tokens = [], [], 0
            if progress is not None:
                progress(read, tokens, len(corpus))
        if held_tokens:
            out.write(held, lengths)
        if not out.shards:
            raise DataError("no document of the inputs holds any text: every line is empty or was skipped")
        shards = tuple(out.shards)
        prepared = Prepared(shards, sum(s.documents for s in shards), tokens, skipped, dtype.name)
        out.finish(
            {
                "format": SHARD_FORMAT,
                "tokenizer_fingerprint": vocabulary.fingerprint,
                "vocab_size": vocabulary.vocab_size,
                "inputs": list(inputs),
                "fields": list(text.columns),
                "template": text.template,
                "text_documents": text_documents,
                **asdict(prepared),
            }
        )
    return prepared


class _Output:
    """The directory of the shards. What an earlier run left there goes when the first shard comes.

    Attributes:
      shards: written so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False
        self.shards: list[Shard] = []

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, overwrite: bool) -> Iterator[Self]:
        """Makes the directory, if it can be written; a block that fails leaves nothing that it made there.

        Raises:
          DataError: it cannot be written, or holds what may not be replaced.
        """
        _check_place(path, overwrite)
        output = cls(path)
        with contextlib.ExitStack() as stack:
            with output._writing():
                stack.enter_context(directory_for(path))
                trial = path / f".partial-{SHARD_META}"
                trial.touch()  # found now, not after hours
                trial.unlink()
            try:
                yield output
            except BaseException:
                if output._begun:
                    output._clear()
                raise

    def write(self, tokens: list[np.ndarray], lengths: list[np.ndarray]) -> None:
        """Adds a shard."""
        with self._writing():
            if not self._begun:
                self._clear()
                self._begun = True
            self.shards.append(_write_shard(self._path, len(self.shards), tokens, lengths))

    def finish(self, meta: dict[str, Any]) -> None:
        """Makes a directory of data of it, in one step."""
        partial = self._path / f".partial-{SHARD_META}"
        with self._writing():
            partial.write_text(json.dumps(meta, indent=2, ensure_ascii=False), encoding="utf-8")
            os.replace(partial, self._path / SHARD_META)

    def _clear(self) -> None:
        for file in [*self._path.iterdir()]:
            if _is_ours(file):
                file.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside it a write that fails is a DataError that says what to do."""
        try:
            yield
        except OSError as error:
            advice = remedy(error, _PLACE) or f"choose another {_PLACE}"
            raise DataError(f"cannot write to the output {self._path}: {error.strerror or error}; {advice}") from error


def _check_place(path: Path, overwrite: bool) -> None:
    if path.is_file():
        raise DataError(f"the output {path} is a file, it must be a directory; choose another {_PLACE}")
    if not path.is_dir() or not (held := [*path.iterdir()]):
        return
    if not overwrite:
        raise DataError(f"the output {path} is not empty; choose another {_PLACE}, or ask to overwrite it")
    foreign = [file.name for file in held if not _is_ours(file)]
    if foreign:
        raise DataError(f"the output {path} holds other files ({clipped(foreign[0])}); only shards are overwritten")


def _is_ours(path: Path) -> bool:
    shard = path.suffix == ".npy" and path.name.startswith(("tokens-", "offsets-"))
    return shard or path.name in (SHARD_META, f".partial-{SHARD_META}")


def _write_shard(output: Path, number: int, tokens: list[np.ndarray], lengths: list[np.ndarray]) -> Shard:
    token_file, offset_file = f"tokens-{number:05d}.npy", f"offsets-{number:05d}.npy"
    joined = np.concatenate(tokens)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    for name, array in ((token_file, joined), (offset_file, offsets)):
        with open(output / name, "wb") as file:
            write_array(file, array)
    return Shard(token_file, offset_file, len(offsets) - 1, len(joined))

"""Learns the tokenizer from weighted corpora, in stages.

A stage is a vocabulary size and a mixture of corpora. It keeps every merge of the stages before it and learns the rest
of its vocabulary from its own mixture, so common words of the first stage can never be crowded out by the later ones.
"""

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stellarbyte_jax.tokenizer.training.bpe import learn_merges
from stellarbyte_jax.tokenizer.training.format import SPECIAL_TOKENS, byte_alphabet

HELD_OUT_SHARE = 50  # one document in so many is kept for the evaluation
_SCALE = 10**10  # weighted counts are whole numbers that sum to about this, so that learning is exact


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents under one name: ``.jsonl`` files hold one object a line, any other file is one document of UTF-8 text.

    Args:
        name: How stages and reports call it.
        paths: Files or globs; ``**`` descends into folders.
        text_field: Field of a JSONL object that holds the text.
        only: Field -> regular expression that must be found in it; other JSONL objects are left out.
    """

    name: str
    paths: tuple[str, ...]
    text_field: str = "text"
    only: Mapping[str, str] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """The files, sorted. Raises ValueError when a path matches none."""
        found: set[str] = set()
        for pattern in self.paths:
            matches = [m for m in glob.glob(pattern, recursive=True) if Path(m).is_file()]
            if not matches:
                raise ValueError(f"corpus {self.name!r}: no file matches {pattern}")
            found.update(matches)
        return [Path(f) for f in sorted(found)]

    def documents(self) -> Iterator[str]:
        """The texts in order of file and line.

        Raises:
            ValueError: A line is not JSON, lacks a field, or a file is not UTF-8; file and line are named.
        """
        for path in self.files():
            if path.suffix == ".jsonl":
                yield from self._lines(path)
            else:
                try:
                    yield path.read_bytes().decode()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path} is not UTF-8 text ({error}): convert it or leave it out") from None

    def _lines(self, path: Path) -> Iterator[str]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
                wanted = (self.text_field, *self.only)
                missing = [f for f in wanted if not isinstance(values, dict) or not isinstance(values.get(f), str)]
                if missing:
                    raise ValueError(f"{path}:{number}: no text in field {missing[0]!r}; each line needs {wanted}")
                if all(re.search(pattern, values[name]) for name, pattern in self.only.items()):
                    yield values[self.text_field]


@dataclass(frozen=True)
class Stage:
    """Vocabulary size after the stage, special tokens and bytes included, and corpus -> share of the mixture."""

    vocab_size: int
    mixture: Mapping[str, float]


@dataclass
class Sample:
    """What training and evaluation need of a corpus."""

    pieces: Counter[str]
    training_bytes: int
    held_out: list[str]


def draw(corpus: Corpus, cut: Callable[[str], Iterable[str]], sample_bytes: int, held_out_bytes: int) -> Sample:
    """Counts the pieces of about ``sample_bytes`` of a corpus and keeps about ``held_out_bytes`` of other documents.

    A hash of each document's text decides, so equal documents fall on the same side and a rerun draws the same.

    Raises:
        ValueError: The corpus holds no text.
    """
    total = sum(len(text.encode()) for text in corpus.documents())
    if not total:
        raise ValueError(f"corpus {corpus.name!r} holds no text: check its paths and --only filters")
    keep = min(1.0, sample_bytes / total)
    keep_held_out = min(1.0, held_out_bytes / (total / HELD_OUT_SHARE))
    sample = Sample(Counter(), 0, [])
    for text in corpus.documents():
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        rest, side = divmod(number, HELD_OUT_SHARE)
        fraction = rest / (2**64 // HELD_OUT_SHARE + 1)
        if side == 0:
            if fraction < keep_held_out:
                sample.held_out.append(text)
        elif fraction < keep:
            sample.pieces.update(cut(text))
            sample.training_bytes += len(text.encode())
    return sample


def mix(samples: Mapping[str, Sample], mixture: Mapping[str, float]) -> dict[str, int]:
    """Piece -> count, scaled so that each corpus has its share of the bytes whatever its size."""
    whole = sum(mixture.values())
    mixed: Counter[str] = Counter()
    for name, share in mixture.items():
        sample = samples[name]
        scale = _SCALE * share / whole / max(sample.training_bytes, 1)
        for piece, count in sample.pieces.items():
            mixed[piece] += max(1, round(count * scale))
    return dict(mixed)


def check_stages(stages: Sequence[Stage], corpora: Iterable[str]) -> None:
    """Raises ValueError where a stage cannot be trained."""
    smallest = len(SPECIAL_TOKENS) + len(byte_alphabet())
    known = sorted(corpora)
    if not stages:
        raise ValueError("give at least one stage")
    for stage in stages:
        if stage.vocab_size <= smallest:
            raise ValueError(
                f"a stage of {stage.vocab_size} leaves no room for merges: {len(SPECIAL_TOKENS)} special tokens and "
                f"256 bytes take {smallest}"
            )
        smallest = stage.vocab_size
        unknown = sorted(set(stage.mixture) - set(known))
        if unknown or not stage.mixture:
            raise ValueError(f"stage {stage.vocab_size} names corpora {unknown}, known are {known}")
        if any(share <= 0 for share in stage.mixture.values()):
            raise ValueError(f"stage {stage.vocab_size}: every share must be positive, got {dict(stage.mixture)}")


def train(
    samples: Mapping[str, Sample],
    stages: Sequence[Stage],
    max_token_length: int | None = 24,
    log: Callable[[str], Any] = lambda line: None,
) -> list[tuple[str, str]]:
    """Merges of all stages; those of a stage are a prefix of those of the next.

    Raises:
        ValueError: Stages do not grow, name an unknown corpus, or ask for more than the text holds.
    """
    check_stages(stages, samples)
    merges: list[tuple[str, str]] = []
    for number, stage in enumerate(stages, 1):
        size = stage.vocab_size - len(SPECIAL_TOKENS) - len(byte_alphabet())
        merges = learn_merges(mix(samples, stage.mixture), size, merges, max_token_length)
        log(f"stage {number} of {len(stages)}: vocabulary {stage.vocab_size}, {size} merges")
    return merges

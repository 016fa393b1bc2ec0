"""Learns the tokenizer from weighted corpora, in stages.

A stage is a vocabulary size and a mixture of corpora. It keeps every merge of the stages before it and learns the rest
of its vocabulary from its own mixture, so common words of the first stage can never be crowded out by the later ones.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.tokenizer.training.bpe import learn_merges
from stellarbyte_jax.tokenizer.training.format import SPECIAL_TOKENS, byte_alphabet

_SCALE = 10**10  # weighted counts are whole numbers that sum to about this, so that learning is exact


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
    skipped: int = 0  # unusable lines that were left out


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

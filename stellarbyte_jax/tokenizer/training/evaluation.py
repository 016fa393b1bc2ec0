"""Measures a tokenizer on held-out text, beside baselines trained on the same mixture."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stellarbyte_jax.tokenizer.directory import vocabulary_size
from stellarbyte_jax.tokenizer.training.bpe import TooLittleTextError, learn_merges, segment
from stellarbyte_jax.tokenizer.training.format import build, byte_alphabet, pre_tokenizer
from stellarbyte_jax.tokenizer.training.stages import Sample, Stage, mix

# The pattern published with GPT-2 (Radford et al. 2019).
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def cutter(tokenizer: Any) -> Callable[[str], Iterator[str]]:
    """Text -> pieces in byte characters, normalised first where the tokenizer does so."""
    normalise = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    cut = tokenizer.pre_tokenizer.pre_tokenize_str
    return lambda text: (piece for piece, _ in cut(normalise(text)))


def measure(tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """UTF-8 bytes of the original text per token, and the share of texts that decoding gives back exactly."""
    rows = [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    tokens = sum(map(len, rows))
    same = sum(t == tokenizer.decode(r, skip_special_tokens=False) for t, r in zip(texts, rows, strict=True))
    size = sum(len(t.encode()) for t in texts)
    return {"bytes_per_token": round(size / max(tokens, 1), 4), "round_trip": round(same / max(len(texts), 1), 4)}


def _measured(tokenizer: Any, samples: Mapping[str, Sample]) -> dict[str, dict[str, float]]:
    """Figures by corpus, of those with text to measure."""
    return {name: measure(tokenizer, sample.held_out) for name, sample in samples.items() if any(sample.held_out)}


def unused(merges: Sequence[tuple[str, str]], pieces: Iterable[str]) -> int:
    """Number of learned tokens that no piece contains in the end: they were only steps to longer ones."""
    ids, _ = segment(list(pieces), merges)
    return len(merges) - int((np.unique(ids) >= len(byte_alphabet())).sum())


def gpt2_like(merges: Sequence[tuple[str, str]]) -> Any:
    """Byte-level BPE cut by GPT-2's pattern; lossless."""
    return build(merges, special_tokens=(), pattern=GPT2_PIECES)


def lossy(merges: Sequence[tuple[str, str]]) -> Any:
    """NFKC, lower case and collapsed white space before byte-level BPE, as the original tokenizer did."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = build(merges, special_tokens=())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


BASELINES: Mapping[str, tuple[Callable[[Sequence[tuple[str, str]]], Any], int]] = {
    "gpt2_like": (gpt2_like, 50_257),
    "lossy": (lossy, 50_000),
}


def evaluate(
    merges: Sequence[tuple[str, str]],
    samples: Mapping[str, Sample],
    stages: Sequence[Stage],
    draw_again: Callable[[Callable[[str], Iterable[str]]], Mapping[str, Sample]] | None = None,
) -> dict[str, Any]:
    """The report: figures by corpus, and those of each baseline where ``draw_again`` samples the corpora for it.

    There are none of a corpus of which no text is held out.
    A baseline is trained in one stage, the last one's mixture, once at the size that it is known for and once at ours.
    Where the text has too few pairs for a size, ``skipped_baselines`` says so.
    """
    tokenizer = build(merges)
    vocab_size = vocabulary_size(tokenizer.get_vocab(with_added_tokens=True).values())
    pieces: Counter[str] = Counter()
    for sample in samples.values():
        pieces.update(sample.pieces)
    report: dict[str, Any] = {
        "vocab_size": vocab_size,
        "stages": [{"vocab_size": s.vocab_size, "mixture": dict(s.mixture)} for s in stages],
        "training_bytes": {n: s.training_bytes for n, s in samples.items()},
        "unused_tokens": unused(merges, pieces),
        "held_out_bytes": {n: sum(len(t.encode()) for t in s.held_out) for n, s in samples.items()},
        "tokenizer": _measured(tokenizer, samples),
        "baselines": {},
        "skipped_baselines": {},
    }
    for name, (make, size) in BASELINES.items() if draw_again else ():
        counts = mix(draw_again(cutter(make(()))), stages[-1].mixture)  # type: ignore[misc]
        learned = _learned(counts, max(size, vocab_size) - len(byte_alphabet()))
        for its_size in (size, vocab_size):
            key, merges_of_it = f"{name}_{its_size}", its_size - len(byte_alphabet())
            if merges_of_it > len(learned):
                report["skipped_baselines"][key] = (
                    f"the corpus has pairs for {len(learned)} merges, {merges_of_it} are needed: give more text"
                )
            else:
                report["baselines"][key] = _measured(make(learned[:merges_of_it]), samples)
    return report


def _learned(counts: Mapping[str, int], size: int) -> list[tuple[str, str]]:
    """Merges, ``size`` of them or as many as there are."""
    try:
        return learn_merges(counts, size)
    except TooLittleTextError as error:
        return error.merges


def pieces_of(pattern: str | None = None) -> Callable[[str], Iterator[str]]:
    """The cutter of the project's own tokenizer."""
    cut = pre_tokenizer(pattern).pre_tokenize_str
    return lambda text: (piece for piece, _ in cut(text))

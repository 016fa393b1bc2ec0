"""Byte-pair encoding that can go on from merges learned before.

The ``tokenizers`` library replaces the vocabulary at each training, so a second corpus cannot continue the first one's
merges there. Here the corpus is one linked list of symbols in numpy arrays, already merged by the earlier stages.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from stellarbyte_jax.tokenizer.training.format import byte_alphabet, byte_characters

_SEPARATOR, _DEAD = -1, -2  # between pieces; swallowed by a merge


class TooLittleTextError(ValueError):
    """The corpus has no pair left; ``merges`` are those that it gave."""

    def __init__(self, merges: list[tuple[str, str]], size: int) -> None:
        """Says how many merges there are and how many, ``size``, were asked for."""
        super().__init__(
            f"the corpus has no pair left after {len(merges)} merges, {size} were asked for: give more text or ask for "
            "a smaller vocabulary"
        )
        self.merges = merges


def learn_merges(
    counts: Mapping[str, int],
    size: int,
    earlier: Sequence[tuple[str, str]] = (),
    max_token_length: int | None = None,
) -> list[tuple[str, str]]:
    """``earlier`` followed by new merges, ``size`` in all; each joins the pair that is then the most frequent.

    Equal counts are decided by the smaller ids, so equal input gives equal merges. A pair is left alone when it would
    be longer than ``max_token_length`` bytes, or would hold a part of one character together with anything else.
    Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.

    Args:
        counts: Piece, in byte characters, -> weighted number of occurrences.
        size: Number of merges to end with.
        earlier: Merges that stay as they are.
        max_token_length: In bytes; None: no limit.

    Raises:
        ValueError: ``size`` is smaller than ``earlier``.
        TooLittleTextError: The corpus has no pair left.
    """
    if size < len(earlier):
        raise ValueError(f"{size} merges were asked for, the earlier stages have already learned {len(earlier)}")
    tokens = [*byte_alphabet(), *(left + right for left, right in earlier)]
    merges = list(earlier)
    corpus = _Corpus.of(counts, earlier)
    heap = [(-count, *pair) for pair, count in corpus.counts.items()]
    heapq.heapify(heap)
    while len(merges) < size:
        if not heap:
            raise TooLittleTextError(merges, size)
        negative, left, right = heapq.heappop(heap)
        count = corpus.counts.get((left, right), 0)
        if count != -negative:  # stale: an earlier merge took some of its occurrences
            if 0 < count < -negative:
                heapq.heappush(heap, (-count, left, right))
            continue
        token = tokens[left] + tokens[right]
        if (max_token_length and len(token) > max_token_length) or not keeps_characters_whole(token):
            corpus.forget((left, right))
            continue
        changed = corpus.merge(left, right, len(tokens))
        tokens.append(token)
        merges.append((tokens[left], tokens[right]))
        for pair in changed:
            heapq.heappush(heap, (-corpus.counts[pair], *pair))
    return merges


def keeps_characters_whole(token: str) -> bool:
    """Whether a token, in byte characters, is whole characters or a part of a single one (UTF-8)."""
    codes = byte_characters()
    raw = bytes(codes[character] for character in token)
    try:
        raw.decode()
        return True
    except UnicodeDecodeError:
        starts = sum(byte & 0xC0 != 0x80 for byte in raw)
        return starts == 0 or (starts == 1 and raw[0] >= 0xC0)


@dataclass
class _Corpus:
    """All pieces, concatenated: position i holds ``symbol[i]``, neighbours are ``before[i]``, ``after[i]``."""

    symbol: np.ndarray  # int32
    after: np.ndarray  # int32
    before: np.ndarray  # int32
    weight: np.ndarray  # int64, occurrences of the piece
    counts: dict[tuple[int, int], int]
    positions: dict[tuple[int, int], list[np.ndarray]]  # first positions of the pair, stale ones among them
    forgotten: set[tuple[int, int]]

    @classmethod
    def of(cls, counts: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> "_Corpus":
        pieces = list(counts)
        ids, lengths = segment(pieces, merges)
        ends = np.cumsum(lengths + 1)
        symbol = np.full(int(ends[-1]) + 1 if len(ends) else 1, _SEPARATOR, np.int32)
        inside = np.ones(len(symbol), bool)
        inside[0] = False
        inside[ends] = False
        symbol[inside] = ids
        weight = np.zeros(len(symbol), np.int64)
        weight[1:] = np.repeat(np.array([counts[p] for p in pieces], np.int64), lengths + 1)
        index = np.arange(len(symbol), dtype=np.int32)
        corpus = cls(symbol, index + 1, index - 1, weight, {}, {}, set())
        starts = np.flatnonzero((symbol[:-1] >= 0) & (symbol[1:] >= 0)).astype(np.int32)
        corpus._add(starts)
        return corpus

    def forget(self, pair: tuple[int, int]) -> None:
        """Takes a pair out of the competition."""
        self.forgotten.add(pair)
        del self.counts[pair], self.positions[pair]

    def merge(self, left: int, right: int, new: int) -> list[tuple[int, int]]:
        """Writes symbol ``new`` over every pair; returns the pairs that have become more frequent."""
        at = np.unique(np.concatenate(self.positions.pop((left, right))))
        at = at[(self.symbol[at] == left)]
        at = at[self.symbol[self.after[at]] == right]
        if left == right:
            at = _without_overlaps(at, self.after)
        second = self.after[at]
        self._subtract(np.unique(np.concatenate([self.before[at], at, second])))
        follower = self.after[second]
        self.symbol[at] = new
        self.symbol[second] = _DEAD
        self.after[at] = follower
        self.before[follower] = at
        return self._add(np.unique(np.concatenate([self.before[at], at])))

    def _pairs(self, at: np.ndarray) -> tuple[list[tuple[int, int]], list[int], list[np.ndarray]]:
        """The distinct pairs that start at ``at``, the weight of each and its positions."""
        left, right = self.symbol[at], self.symbol[self.after[at]]
        valid = (left >= 0) & (right >= 0)
        at = at[valid]
        if not len(at):
            return [], [], []
        keys = (left[valid].astype(np.int64) << 32) | right[valid]
        order = np.argsort(keys, kind="stable")
        keys, at = keys[order], at[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        totals = np.add.reduceat(self.weight[at], first).tolist()
        bounds = [*first.tolist(), len(at)]
        found = keys[first]
        pairs = list(zip((found >> 32).tolist(), (found & 0xFFFFFFFF).tolist(), strict=True))
        return pairs, totals, [at[a:b] for a, b in pairwise(bounds)]

    def _subtract(self, at: np.ndarray) -> None:
        for pair, total, _ in zip(*self._pairs(at), strict=True):
            if pair not in self.forgotten:
                self.counts[pair] -= total

    def _add(self, at: np.ndarray) -> list[tuple[int, int]]:
        competing = []
        for pair, total, place in zip(*self._pairs(at), strict=True):
            if pair not in self.forgotten:
                self.counts[pair] = self.counts.get(pair, 0) + total
                self.positions.setdefault(pair, []).append(place)
                competing.append(pair)
        return competing


def _without_overlaps(at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """In "aaa" the pair (a, a) stands twice, but only the first can be merged."""
    kept, taken = [], -1
    for position, successor in zip(at.tolist(), after[at].tolist(), strict=True):
        if position != taken:
            kept.append(position)
            taken = successor
    return np.array(kept, np.int32)


def segment(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Symbols of all pieces, concatenated, after the earlier merges, and their number in each piece."""
    from tokenizers import Tokenizer, models

    tokens = [*byte_alphabet(), *(left + right for left, right in merges)]
    model: Any = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges), cache_capacity=0)
    library = Tokenizer(model)
    ids, lengths, step = [np.zeros(0, np.int32)], [], 20_000
    for start in range(0, len(pieces), step):
        rows = [e.ids for e in library.encode_batch_fast(list(pieces[start : start + step]))]
        ids.append(np.fromiter(chain.from_iterable(rows), np.int32))
        lengths.extend(map(len, rows))
    return np.concatenate(ids), np.array(lengths, np.int64)

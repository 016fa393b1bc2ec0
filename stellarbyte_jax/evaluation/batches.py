"""Which continuations are scored in one call, in arrays of few shapes, so that few programs compile."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stellarbyte_jax.evaluation.texts import Pair

_SMALLEST = 32  # tokens of a row
_SMALLEST_CONTINUATION = 8


@dataclass(frozen=True, eq=False)
class Whole:
    """Rows that are read whole: contexts that are not shared, or too short to be worth a cache.

    R rows, T tokens, M of them scored.

    Attributes:
      numbers: of the pairs, one for each of the first rows; the other rows are padding.
      tokens_RT: int32, contexts and continuations without their last tokens, padded on the right.
      first_R: int32, index of the token before each continuation.
      targets_RM: int32, continuations; -1 behind them.
    """

    numbers: list[int]
    tokens_RT: np.ndarray
    first_R: np.ndarray
    targets_RM: np.ndarray


@dataclass(frozen=True, eq=False)
class Shared:
    """Rows whose contexts are read once each, with a cache that all continuations of a context begin with.

    B contexts of W tokens, R rows, M tokens of a continuation but its last one; M is 0 where none has several.

    Attributes:
      numbers: of the pairs, one for each of the first rows; the other rows are padding.
      contexts_BW: int32, padded on the right.
      lengths_B: int32, tokens of each context.
      owners_R: int32, the context of each row.
      targets_RM: int32 [R, 1 + M], continuations; -1 behind them.
    """

    numbers: list[int]
    contexts_BW: np.ndarray
    lengths_B: np.ndarray
    owners_R: np.ndarray
    targets_RM: np.ndarray


def batches(pairs: Sequence[Pair], rows: int, max_length: int) -> Iterator[Whole | Shared]:
    """All pairs, the longest ones first: what does not fit into memory fails at once.

    Args:
      pairs: what is scored.
      rows: continuations of one call.
      max_length: tokens that the model reads at once, which no pair is longer than; padding does not go beyond.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(pair.context, []).append(number)
    shared, whole = [], []
    for group in groups.values():
        parts = [group[at : at + rows] for at in range(0, len(group), rows)]
        for part in parts:
            if _is_worth_a_cache([pairs[number] for number in part]):
                shared.append(part)
            else:
                whole.extend(part)
    yield from _shared_batches(pairs, shared, rows, max_length)
    yield from _whole_batches(pairs, whole, rows, max_length)


def rounded(length: int, smallest: int, limit: int) -> int:
    """A length rounded up to a power of two or one and a half times one, within the limit."""
    if length <= smallest:
        return min(smallest, limit)
    half = 1 << (length - 1).bit_length() - 2
    return min(-(-length // half) * half, limit)


def _is_worth_a_cache(pairs: Sequence[Pair]) -> bool:
    """Whether reading the context once saves a quarter of the tokens; a cache costs some time of its own."""
    whole = sum(len(pair.context) + len(pair.continuation) for pair in pairs)
    return 4 * (len(pairs) - 1) * len(pairs[0].context) >= whole


def _rows(wanted: int, limit: int) -> int:
    """Rows of an array for so many, a power of two or the limit."""
    return min(limit, 1 << (wanted - 1).bit_length())


def _whole_batches(pairs: Sequence[Pair], numbers: list[int], limit: int, max_length: int) -> Iterator[Whole]:
    def sizes(number: int) -> tuple[int, int]:
        context, continuation = pairs[number]
        longest = len(context) + len(continuation) - 1
        width = rounded(len(continuation), _SMALLEST_CONTINUATION, max_length)
        return rounded(longest, _SMALLEST, max_length), width

    ordered = sorted(numbers, key=sizes, reverse=True)
    R = _rows(len(ordered), limit) if ordered else 0
    for at in range(0, len(ordered), limit):
        part = ordered[at : at + limit]
        T, M = (max(column) for column in zip(*map(sizes, part), strict=True))
        tokens_RT, first_R = np.zeros((R, T), np.int32), np.zeros(R, np.int32)
        targets_RM = np.full((R, M), -1, np.int32)
        for row, number in enumerate(part):
            context, continuation = pairs[number]
            ids = (*context, *continuation[:-1])
            tokens_RT[row, : len(ids)] = ids
            first_R[row] = len(context) - 1
            targets_RM[row, : len(continuation)] = continuation
        yield Whole(part, tokens_RT, first_R, targets_RM)


def _shared_batches(pairs: Sequence[Pair], groups: list[list[int]], limit: int, max_length: int) -> Iterator[Shared]:
    def sizes(group: list[int]) -> tuple[int, int]:
        longest = max(len(pairs[number].continuation) for number in group) - 1
        width = rounded(longest, _SMALLEST_CONTINUATION, max_length) if longest else 0
        return rounded(len(pairs[group[0]].context), _SMALLEST, max_length), width

    ordered = sorted(groups, key=sizes, reverse=True)
    R = _rows(sum(map(len, ordered)), limit) if ordered else 0
    while ordered:
        part, taken = [ordered[0]], len(ordered[0])
        for group in ordered[1:]:
            if taken + len(group) > limit:
                break
            part.append(group)
            taken += len(group)
        del ordered[: len(part)]
        W, M = (max(column) for column in zip(*map(sizes, part), strict=True))
        B = _rows(len(part), limit)
        contexts_BW, lengths_B = np.zeros((B, W), np.int32), np.ones(B, np.int32)
        owners_R, targets_RM = np.zeros(R, np.int32), np.full((R, 1 + M), -1, np.int32)
        row = 0
        for owner, group in enumerate(part):
            context = pairs[group[0]].context
            contexts_BW[owner, : len(context)], lengths_B[owner] = context, len(context)
            for number in group:
                continuation = pairs[number].continuation
                owners_R[row], targets_RM[row, : len(continuation)] = owner, continuation
                row += 1
        yield Shared([number for group in part for number in group], contexts_BW, lengths_B, owners_R, targets_RM)

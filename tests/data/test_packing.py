"""Packing: no token is lost or moved, rows are full, segments are limited, and any place can be returned to."""

import numpy as np
import pytest
from helpers.tiny_documents import groups_of

from stellarbyte_jax.data.packing import PackDocuments

PAD = 9


def _documents(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(10, 1000, n).astype(np.int32) for n in lengths]


def _row_by_row(documents, length, limit):
    """The same rule, one token at a time: rows of (token, document, position) and Nones."""
    rows, row, segments, previous = [], [], 0, None
    for number, document in enumerate(documents):
        for index, token in enumerate(document):
            new = number != previous or not row
            if len(row) == length or (index == 0 and segments == limit):
                rows.append(row + [None] * (length - len(row)))
                row, segments, new = [], 0, True
            if new:
                segments += 1
                position = 0
            row.append((int(token), segments, position))
            position += 1
            previous = number
    if row:
        rows.append(row + [None] * (length - len(row)))
    return rows


CASES = {
    "short": ([3, 4, 5, 2, 2, 7, 1, 1, 1, 1, 1, 6], 8, 64, 2),
    "long": ([50, 3, 21, 8, 8, 16], 8, 64, 3),
    "limited": ([1, 1, 1, 1, 9, 2, 1, 1, 1, 1, 1, 1, 1, 30, 1, 1, 1], 8, 3, 2),
    "one segment a row": ([3, 3, 10, 1, 4], 4, 1, 2),
    "exact": ([8, 8, 16, 4, 4], 8, 64, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_the_rule_applied_token_by_token(case):
    lengths, length, limit, rows = CASES[case]
    documents = _documents(lengths)
    batches = list(
        PackDocuments(groups_of(documents), batch_size=rows, sequence_length=length, max_documents=limit, pad=PAD)
    )
    expected = _row_by_row(documents, length, limit)
    assert len(batches) == -(-len(expected) // rows)
    expected += [[None] * length] * (len(batches) * rows - len(expected))
    got = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    for r, row in enumerate(expected):
        for t, cell in enumerate(row):
            token, segment, position = cell or (PAD, 0, 0)
            assert got["tokens"][r, t] == token
            assert got["segment_ids"][r, t] == segment
            assert got["positions"][r, t] == position
            assert got["loss_mask"][r, t] == (cell is not None and position > 0)
    assert {k: v.dtype for k, v in got.items()} == {
        "tokens": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "loss_mask": np.bool_,
    }


@pytest.mark.parametrize("case", CASES)
def test_every_place_can_be_returned_to(case):
    lengths, length, limit, rows = CASES[case]
    dataset = PackDocuments(
        groups_of(_documents(lengths)), batch_size=rows, sequence_length=length, max_documents=limit, pad=PAD
    )
    iterator = iter(dataset)
    states, batches = [iterator.get_state()], []
    for batch in iterator:
        batches.append(batch)
        states.append(iterator.get_state())
    assert states[-1]["skipped"] == -(-len(lengths) // 3)
    for begin, state in enumerate(states):
        again = iter(dataset)
        again.set_state(state)
        assert again.get_state() == state
        rest = list(again)
        assert len(rest) == len(batches) - begin
        for got, expected in zip(rest, batches[begin:], strict=True):
            for key in expected:
                np.testing.assert_array_equal(got[key], expected[key])
        assert again.get_state() == states[-1]


def test_random_documents_lose_no_token():
    rng = np.random.default_rng(1)
    documents = _documents(rng.integers(0, 40, 300))
    batches = list(PackDocuments(groups_of(documents), batch_size=4, sequence_length=32, max_documents=5, pad=PAD))
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
    np.testing.assert_array_equal(tokens, np.concatenate(documents))
    assert max(b["segment_ids"].max() for b in batches) == 5

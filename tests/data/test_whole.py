"""Rows of whole conversations: nothing is cut or lost, and any place can be gone back to."""

import grain
import numpy as np
import pytest

from stellarbyte_jax.data.whole import WholeConversations

PAD = 9


def _groups(lengths, size=5):
    """Groups as EncodeConversations makes them: tokens tell document and place, the last two of each are a reply."""

    def group(numbers):
        made = [1000 * (n + 1) + np.arange(lengths[n]) for n in numbers]
        replies = [np.arange(lengths[n]) >= lengths[n] - 2 for n in numbers]
        return {
            "tokens": np.concatenate([*made, np.zeros(0)]).astype(np.int32),
            "replies": np.concatenate([*replies, np.zeros(0)]).astype(np.int32),
            "lengths": np.array([len(m) for m in made], np.int64),
            "skipped": 0,
            "shortened": 1,
            "left_out": sum(len(m) == 0 for m in made),
        }

    return grain.MapDataset.range(len(lengths)).batch(size, batch_fn=list).map(group)


def _batches(lengths, rows=3, length=16, most=4, prompts=False):
    return WholeConversations(
        _groups(lengths), prompts=prompts, batch_size=rows, sequence_length=length, max_documents=most, pad=PAD
    )


@pytest.fixture
def lengths():
    found = np.random.default_rng(0).integers(0, 17, 300)
    found[found == 1] = 0
    return found


def test_each_conversation_is_whole_in_one_row_once(lengths):
    seen = []
    for batch in _batches(lengths):
        for row in range(3):
            ids = batch["segment_ids"][row]
            assert ids.max() <= 4 and np.all(np.diff(np.flatnonzero(ids)) == 1), "padding at the end alone"
            assert np.all(batch["tokens"][row][ids == 0] == PAD)
            for segment in range(1, ids.max() + 1):
                inside = ids == segment
                tokens, document = batch["tokens"][row][inside], batch["tokens"][row][inside][0] // 1000 - 1
                np.testing.assert_array_equal(tokens, 1000 * (document + 1) + np.arange(lengths[document]))
                np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(lengths[document]))
                reply = np.arange(lengths[document]) >= lengths[document] - 2
                np.testing.assert_array_equal(batch["replies"][row][inside], reply)
                np.testing.assert_array_equal(batch["loss_mask"][row][inside], reply & (np.arange(len(tokens)) > 0))
                seen.append(document)
    assert sorted(seen) == np.flatnonzero(lengths).tolist()


def test_rows_take_the_first_that_fits():
    batch, rest = _batches([10, 3, 7, 5, 6, 2], rows=2)
    assert rest["segment_ids"].sum() == 6
    rows = [[int(t) // 1000 for t in row if t != PAD] for row in batch["tokens"]]
    assert [list(dict.fromkeys(row)) for row in rows] == [[1, 2, 6], [3, 4]]
    batch, rest = _batches([2] * 9, rows=2)
    assert batch["segment_ids"].max(axis=1).tolist() == [4, 4] and rest["segment_ids"].max() == 1, "not more than 4"


def test_rows_are_nearly_full(lengths):
    batches = list(_batches(lengths, length=32, most=16))
    used = sum((batch["segment_ids"] > 0).sum() for batch in batches[:-1])
    assert used / (3 * 32 * (len(batches) - 1)) > 0.97


def test_prompts_are_in_the_loss_where_asked_for(lengths):
    for batch in _batches(lengths, prompts=True):
        np.testing.assert_array_equal(batch["loss_mask"], (batch["segment_ids"] > 0) & (batch["positions"] > 0))


@pytest.mark.parametrize("rows", [3, 2])
def test_any_place_can_be_gone_back_to(lengths, rows):
    """Also with other rows in a batch: the order of conversations goes on."""
    iterator = iter(_batches(lengths))
    states, batches = [], []
    for _ in range(12):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    for at in (0, 1, 5, 11):
        again = iter(_batches(lengths, rows=rows))
        again.set_state(states[at])
        assert again.get_state() == states[at], "before the first batch too"
        found = next(again)
        for name, array in found.items():
            np.testing.assert_array_equal(array, batches[at][name][:rows])
        if rows == 3 and at < 11:
            assert again.get_state() == states[at + 1]


def test_what_was_left_out_is_counted(lengths):
    iterator = iter(_batches(lengths))
    for _ in iterator:
        pass
    state = iterator.get_state()
    assert (state["left_out"], state["shortened"], state["waiting"]) == ((lengths == 0).sum(), 60, [])
    again = iter(_batches(lengths))
    next(again)
    middle = again.get_state()
    for _ in again:
        pass
    third = iter(_batches(lengths))
    third.set_state(middle)
    for _ in third:
        pass
    assert third.get_state() == again.get_state() == state

"""What all arrangements share: the arrays of a batch worked out by hand, an iterator that ends, fails and closes."""

import inspect

import grain
import numpy as np
import pytest
from helpers.tiny_documents import groups_of

from stellarbyte_jax.data.batches import BatchIterator, DocumentBatches, batch_arrays
from stellarbyte_jax.data.contiguous import ContiguousDocuments
from stellarbyte_jax.data.packing import PackDocuments
from stellarbyte_jax.data.sources import DataError

PAD = 9


def arrays(tokens, begins, used, offsets):
    return batch_arrays(
        np.asarray(tokens, np.int32), np.asarray(begins, bool), np.asarray(used), np.asarray(offsets, np.int64)
    )


def test_the_arrays_of_a_batch():
    """Rows: three documents; one that goes on at 40, another one and padding; one that goes on alone; padding alone."""
    tokens = [[5, 6, 7, 8, 5, 6], [1, 2, 3, 4, PAD, PAD], [4, 5, 6, 7, 8, 9], [PAD] * 6]
    begins = [[1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    batch = arrays(tokens, begins, used=[6, 4, 6, 0], offsets=[0, 40, 7, 0])
    assert batch["tokens"].tolist() == tokens
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 3, 3, 3], [1, 1, 2, 2, 0, 0], [1] * 6, [0] * 6]
    assert batch["positions"].tolist() == [[0, 1, 0, 0, 1, 2], [40, 41, 0, 1, 0, 0], [7, 8, 9, 10, 11, 12], [0] * 6]
    assert batch["loss_mask"].tolist() == [
        [False, True, False, False, True, True],
        [False, True, False, True, False, False],
        [False, True, True, True, True, True],
        [False] * 6,
    ]
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "loss_mask": np.bool_,
    }


def test_the_smallest_batch():
    batch = arrays([[3]], [[1]], used=[1], offsets=[2])
    assert {name: array.tolist() for name, array in batch.items()} == {
        "tokens": [[3]],
        "segment_ids": [[1]],
        "positions": [[2]],
        "loss_mask": [[False]],
    }


class Sums(DocumentBatches):
    """One batch for each group: the sum of its tokens."""

    def __iter__(self):
        return SumsIterator(self)


class SumsIterator(BatchIterator):
    def __init__(self, dataset):
        super().__init__(dataset)
        self.set_state({"group": 0, "skipped": 0})

    def get_state(self):
        return {"group": self._next_group, "skipped": self._skipped}

    def set_state(self, state):
        self._go_to(state["group"], state["skipped"])

    def _make_batch(self):
        group = self._pull()
        return None if group is None else {"sum": group["tokens"].sum(initial=0)}


def group(*tokens, skipped=0):
    return {"tokens": np.asarray(tokens, np.int32), "lengths": np.asarray([len(tokens)]), "skipped": skipped}


def sums_of(groups, **settings):
    return Sums(grain.MapDataset.source(groups), batch_size=1, sequence_length=4, max_documents=2, pad=PAD, **settings)


GROUPS = [group(1, 2), group(3, skipped=2), group(), group(4, 5, 6, skipped=1)]


def test_groups_are_pulled_in_order_and_skipped_lines_counted():
    iterator = iter(sums_of(GROUPS))
    seen = [(int(batch["sum"]), iterator.get_state()) for batch in iterator]
    assert seen == [
        (3, {"group": 1, "skipped": 0}),
        (3, {"group": 2, "skipped": 2}),
        (0, {"group": 3, "skipped": 2}),
        (15, {"group": 4, "skipped": 3}),
    ]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)
    assert iterator.get_state() == {"group": 4, "skipped": 3}


def test_any_place_can_be_gone_to_also_after_the_end():
    iterator = iter(sums_of(GROUPS))
    assert len(list(iterator)) == 4
    iterator.set_state({"group": 1, "skipped": 7})
    assert [int(batch["sum"]) for batch in iterator] == [3, 0, 15]
    assert iterator.get_state() == {"group": 4, "skipped": 10}
    iterator.set_state({"group": 4, "skipped": 0})
    assert list(iterator) == []


def failing_at(number, groups):
    def read(index):
        if index == number:
            raise DataError(f"a.jsonl:{index}: unusable")
        return groups[index]

    return Sums(
        grain.MapDataset.range(len(groups)).map(read), batch_size=1, sequence_length=4, max_documents=2, pad=PAD
    )


def test_an_error_ends_the_iteration_until_another_place_is_gone_to():
    iterator = iter(failing_at(1, GROUPS))
    assert next(iterator)["sum"] == 3
    errors = []
    for _ in range(3):
        with pytest.raises(DataError, match=r"a\.jsonl:1: unusable") as caught:
            next(iterator)
        errors.append(caught.value)
    assert errors[0] is errors[1] is errors[2]
    iterator.set_state({"group": 2, "skipped": 0})
    assert [int(batch["sum"]) for batch in iterator] == [0, 15]


def test_closing_ends_the_source():
    iterator = iter(sums_of(GROUPS))
    iterator.close()
    next(iterator)
    source = iterator._source
    assert inspect.getgeneratorstate(source) == inspect.GEN_SUSPENDED
    for _ in range(2):
        iterator.close()
        assert inspect.getgeneratorstate(source) == inspect.GEN_CLOSED


@pytest.mark.parametrize(("epoch_groups", "fails"), [(2, True), (3, False), (0, False)])
def test_a_whole_epoch_without_a_token_is_an_error(epoch_groups, fails):
    groups = [group(), group(1), group(), group(), group(2)]
    iterator = iter(sums_of(groups, epoch_groups=epoch_groups))
    if not fails:
        assert [int(batch["sum"]) for batch in iterator] == [0, 1, 0, 0, 2]
        return
    assert [int(next(iterator)["sum"]) for _ in range(3)] == [0, 1, 0]
    with pytest.raises(
        DataError, match="no document of the data holds any text: every line is empty, too long or was skipped"
    ):
        next(iterator)


@pytest.mark.parametrize("arrangement", [PackDocuments, ContiguousDocuments])
def test_data_without_a_token_is_an_error_not_an_endless_wait(arrangement):
    groups = groups_of([np.zeros(0, np.int32)] * 3).repeat()
    iterator = iter(arrangement(groups, batch_size=2, sequence_length=8, max_documents=4, pad=PAD, epoch_groups=1))
    for _ in range(2):
        with pytest.raises(DataError, match="no document of the data holds any text"):
            next(iterator)

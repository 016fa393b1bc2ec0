"""Streams: each row follows its documents from batch to batch, none is lost, and any place can be returned to."""

import json

import numpy as np
import pytest
from helpers.tiny_documents import groups_of, save_byte_tokenizer

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data.contiguous import ContiguousDocuments
from stellarbyte_jax.data.encode import GROUP_DOCUMENTS
from stellarbyte_jax.data.loader import make_loader, measure_loader
from stellarbyte_jax.data.sources import DataError
from stellarbyte_jax.tokenizer.codec import Tokenizer, load_tokenizer

PAD = 9
CASES = {  # lengths of the documents, sequence length, most documents in a row, rows
    "short": ([3, 4, 5, 2, 2, 7, 1, 1, 1, 1, 1, 6], 8, 64, 2),
    "longer than several rows": ([50, 3, 21, 8, 8, 16, 33, 2], 8, 64, 3),
    "limited": ([1, 1, 1, 1, 9, 2, 1, 1, 1, 1, 1, 1, 1, 30, 1, 1, 1], 8, 3, 2),
    "one document a row": ([3, 3, 10, 1, 4], 4, 1, 2),
    "ends at the row's end": ([8, 8, 16, 4, 4], 8, 64, 2),
    "empty ones": ([0, 5, 0, 0, 9, 0, 3, 0, 0, 0], 4, 2, 2),
    "more rows than documents": ([3, 20, 5], 8, 64, 6),
    "one row": ([3, 20, 5], 8, 64, 1),
}


def _documents(lengths):
    """Documents whose tokens tell which one they are of and at which place."""
    return [1000 * (d + 1) + np.arange(n, dtype=np.int32) for d, n in enumerate(lengths)]


def _dataset(case):
    lengths, length, limit, rows = CASES[case]
    return ContiguousDocuments(
        groups_of(_documents(lengths)), batch_size=rows, sequence_length=length, max_documents=limit, pad=PAD
    )


def _token_by_token(documents, rows, length, limit):
    """The same rule, one token at a time: batches of rows of (token, segment, position, is a target) and Nones."""
    waiting = [list(d) for d in documents if len(d)]
    current = [None] * rows
    batches = []
    while waiting or any(current):
        batch = []
        for b in range(rows):
            row, segment = [], 0
            while len(row) < length:
                if not current[b]:
                    if segment == limit or not waiting:
                        break
                    current[b] = list(enumerate(waiting.pop(0)))
                    first = True
                else:
                    first = not row
                segment += first
                position, token = current[b].pop(0)
                row.append((token, segment, position, not first))
            batch.append(row + [None] * (length - len(row)))
        batches.append(batch)
    return batches


def _assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("case", CASES)
def test_batches_equal_the_rule_applied_token_by_token(case):
    lengths, length, limit, rows = CASES[case]
    batches = list(_dataset(case))
    expected = _token_by_token(_documents(lengths), rows, length, limit)
    assert len(batches) == len(expected)
    for batch, cells in zip(batches, expected, strict=True):
        padded = [[cell or (PAD, 0, 0, False) for cell in row] for row in cells]
        for index, key in enumerate(("tokens", "segment_ids", "positions", "loss_mask")):
            np.testing.assert_array_equal(batch[key], [[cell[index] for cell in row] for row in padded])
    assert {k: v.dtype for k, v in batches[0].items()} == {
        "tokens": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "loss_mask": np.bool_,
    }


def test_every_document_lies_in_order_in_one_row():
    rng = np.random.default_rng(1)
    documents = _documents(rng.integers(0, 90, 300))
    batches = list(
        ContiguousDocuments(groups_of(documents), batch_size=4, sequence_length=32, max_documents=5, pad=PAD)
    )
    seen, taken = {}, []
    for batch in batches:
        for row in range(4):
            real = batch["segment_ids"][row] > 0
            tokens, positions = batch["tokens"][row][real], batch["positions"][row][real]
            np.testing.assert_array_equal(tokens % 1000, positions)
            for number in dict.fromkeys((tokens // 1000 - 1).tolist()):
                mine = tokens[tokens // 1000 - 1 == number]
                if number in seen:
                    assert seen[number][0] == row
                    assert mine[0] == seen[number][1][-1] + 1
                    assert tokens[0] == mine[0]  # what continues stands at the row's beginning
                    seen[number][1].extend(mine)
                else:
                    taken.append(number)
                    seen[number] = (row, list(mine))
    assert taken == sorted(taken)
    assert {number: tokens for number, (_, tokens) in seen.items()} == {
        number: list(document) for number, document in enumerate(documents) if len(document)
    }


@pytest.mark.parametrize("case", CASES)
def test_every_place_can_be_returned_to(case):
    dataset = _dataset(case)
    iterator = iter(dataset)
    states, batches = [iterator.get_state()], []
    for batch in iterator:
        batches.append(batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
    last = iterator.get_state()
    assert last == {"group": len(dataset.groups), "document": 0, "skipped": len(dataset.groups), "rows": last["rows"]}
    assert last["rows"] == [None] * dataset.batch_size
    for begin, state in enumerate(states):
        again = iter(dataset)
        again.set_state(state)
        assert again.get_state() == state
        _assert_equal(list(again), batches[begin:])
        assert again.get_state() == last
        with pytest.raises(StopIteration):
            next(again)


def test_a_state_of_another_number_of_rows_is_refused():
    state = iter(_dataset("short")).get_state()
    with pytest.raises(DataError, match="2 rows followed their documents, now there are 6; keep the batch size"):
        iter(_dataset("more rows than documents")).set_state(state)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [f"<{i}>" + "x" * int(rng.choice([3, 40, 300])) for i in range(2 * GROUP_DOCUMENTS + 5)]


@pytest.fixture
def data(tmp_path, tokenizer, texts):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return DataConfig(
        train=(str(path),),
        validation=(str(path),),
        tokenizer=tokenizer,
        sequence_length=64,
        arrangement="contiguous",
        epochs=2,
        workers=0,
        cache_dir=str(tmp_path / "cache"),
    )


def _replace(config, **changes):
    return DataConfig.from_dict({**config.to_dict(), **changes})


def _loader(config, split="train", batch_size=4, **more):
    return make_loader(config, split=split, batch_size=batch_size, seed=7, **more)


def _texts(batches, config):
    """The texts of one row after the other, glued from its tokens between BOS and EOS."""
    tokenizer = load_tokenizer(config.tokenizer)
    found = []
    for row in range(len(batches[0]["tokens"])):
        tokens = np.concatenate([b["tokens"][row][b["segment_ids"][row] > 0] for b in batches])
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)
        assert len(parts.pop()) == 0
        assert all(part[0] == tokenizer.bos_id for part in parts)
        found += [tokenizer.decode(part[1:-1].tolist()) for part in parts]
    return found


def test_each_epoch_holds_each_document_once(data, texts):
    with _loader(data) as loader:
        batches = list(loader)
        assert loader.epoch > 1.9
    assert sorted(_texts(batches, data)) == sorted(texts * 2)
    assert (batches[len(batches) // 2]["segment_ids"] > 0).all()  # no gap between the epochs
    with _loader(_replace(data, epochs=None)) as loader:
        while loader.epoch < 3:
            next(loader)


def test_resuming_is_exact_in_the_middle_of_documents_with_any_workers(data):
    with _loader(_replace(data, prefetch=5)) as loader:
        states, batches = [loader.state()], []
        for batch in loader:
            batches.append(batch)
            states.append(json.loads(json.dumps(loader.state())))
    assert sum(any(row and row[2] for row in state["rows"]) for state in states) > len(states) / 2
    for begin in (0, 1, 7, len(states) // 2, len(states) - 1):
        with _loader(_replace(data, prefetch=1)) as loader:
            loader.restore(states[begin])
            assert loader.state() == states[begin]
            _assert_equal(list(loader), batches[begin:])
            assert loader.state() == states[-1]
    with _loader(_replace(data, workers=2)) as loader:
        _assert_equal([next(loader) for _ in range(9)], batches[:9])
        assert loader.state() == states[9]
        loader.restore(states[5])
        _assert_equal([next(loader) for _ in range(9)], batches[5:14])


def test_one_long_document_is_encoded_once_and_held_once_for_all_rows(data, tmp_path, monkeypatch):
    """Every row reads it, each of another epoch."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "".join(chr(97 + n % 23) for n in range(1000))}))
    encoded, encode_batch = [], Tokenizer.encode_batch

    def recording(self, texts):
        encoded.extend(texts)
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", recording)
    config = _replace(data, train=[str(path)], epochs=None)
    with _loader(config, batch_size=8) as loader:
        batches, states = [], []
        for _ in range(40):
            batches.append(next(loader))
            states.append(loader.state())
    assert states[-1]["group"] == 24  # three documents a row so far
    assert len(encoded) == 1
    with _loader(config, batch_size=8) as loader:
        loader.restore(states[17])
        _assert_equal([next(loader) for _ in range(20)], batches[18:38])
    assert len(encoded) == 2
    with _loader(_replace(config, workers=2), batch_size=8) as loader:
        _assert_equal([next(loader) for _ in range(40)], batches)
    long = ContiguousDocuments(
        groups_of(_documents([100]) * 8, 1), batch_size=8, sequence_length=64, max_documents=4, pad=PAD
    )
    iterator = iter(long)
    next(iterator)
    assert len({id(reading.tokens) for reading in iterator._rows}) == 1


def test_fewer_documents_than_rows_are_told(data, texts, caplog):
    for rows, told in ((len(texts), False), (len(texts) + 1, True)):
        caplog.clear()
        _loader(data, batch_size=rows).close()
        _loader(_replace(data, arrangement="packed"), batch_size=rows).close()
        assert [f"{len(texts)} documents for {rows} rows" in r.getMessage() for r in caplog.records] == [True] * told


def test_validation_starts_again_with_new_documents_in_order(data, texts):
    with _loader(data, split="validation") as loader:
        first = list(loader)
        assert (first[0]["positions"][:, 0] == 0).all()
        assert (first[1]["positions"][:, 0] > 0).any()
        assert sorted(_texts(first, data)) == sorted(texts)
        _assert_equal(list(loader), first)
        next(iter(loader))
        _assert_equal(list(loader), first)


def test_restoring_another_arrangement_or_batch_size_is_refused(data):
    packed = _replace(data, arrangement="packed")
    with _loader(data) as contiguous, _loader(packed) as loader:
        state, packed_state = contiguous.state(), loader.state()
        with pytest.raises(DataError, match="arrangement was 'contiguous' and is now 'packed'"):
            loader.restore(state)
        with pytest.raises(DataError, match="arrangement was 'packed' and is now 'contiguous'"):
            contiguous.restore(packed_state)
        loader.restore(packed_state)
    with _loader(data, batch_size=6) as loader, pytest.raises(DataError, match=r"4 rows .* now there are 6"):
        loader.restore(state)


def test_skipped_lines_are_counted_and_a_bad_line_is_one_clear_error(data, texts):
    with open(data.train[0], "a") as file:
        file.write('{"txt": "x"}\n')
    config = _replace(data, on_error="skip", epochs=1)
    with _loader(config) as loader:
        assert sorted(_texts(list(loader), data)) == sorted(texts)
        assert loader.skipped == 1
        state = loader.state()
    with _loader(config) as loader:
        loader.restore(state)
        assert loader.skipped == 1
    with _loader(_replace(data, shuffle=False)) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=rf"a\.jsonl:{len(texts) + 1}: no field 'text'"):
                list(loader)


def test_measuring_the_loader_counts_tokens(data):
    measured = measure_loader(_replace(data, epochs=None), batch_size=2, seconds=0.05)
    assert measured["batches"] >= 1
    assert measured["padding"] < 0.2

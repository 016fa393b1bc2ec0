"""Documents to ids: whose ids they are, which are left out, in which order they come, and what workers leave alone."""

import os
import pickle

import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer
from tokenizers import Tokenizer as Library

from stellarbyte_jax.data import sources
from stellarbyte_jax.data.encode import (
    GROUP_DOCUMENTS,
    EncodeDocuments,
    document_groups,
    iterate_groups,
)
from stellarbyte_jax.data.shards import prepare
from stellarbyte_jax.data.sources import DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.tokenizer.codec import Tokenizer, load_tokenizer

LINES = '{"text": "ab"}\n{"text": ""}\n{"txt": "x"}\n{"text": "春"}\n{"text": 5}\n{"text": "c<eos>"}\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ids_of(tokenizer):
    """Ids of a text by the library: one for each byte."""
    library = Library.from_file(f"{tokenizer}/tokenizer.json")
    library.encode_special_tokens = True

    def ids(text):
        found = library.encode(text, add_special_tokens=False).ids
        assert len(found) == len(text.encode())
        return found

    return ids


@pytest.fixture
def encoder(tmp_path, tokenizer):
    """Makes an encoder of the files with these contents, named a.jsonl, b.jsonl, or of prepared directories."""

    def make(*contents, **settings):
        paths = []
        for name, content in zip("abc", contents, strict=False):
            paths.append(tmp_path / f"{name}.jsonl")
            paths[-1].write_text(content, encoding="utf-8")
        return make_of(paths, **settings)

    def make_of(paths, **settings):
        corpus = open_corpus(
            [str(path) for path in paths],
            setting="data.train",
            columns=("text",),
            fingerprint=load_tokenizer(tokenizer).fingerprint,
            cache_dir=tmp_path / "cache",
        )
        return EncodeDocuments(corpus, TextFormat(), tokenizer, **{"bos": None, "eos": None, **settings})

    make.of = make_of
    return make


def assert_group(group, documents, skipped=0):
    assert group["tokens"].tolist() == [token for ids in documents for token in ids]
    assert group["lengths"].tolist() == [len(ids) for ids in documents]
    assert (group["tokens"].dtype, group["lengths"].dtype) == (np.int32, np.int64)
    assert group["skipped"] == skipped


@pytest.mark.parametrize(
    ("bos", "eos", "before", "after"),
    [(None, None, [], []), (1000, None, [1000], []), (None, 0, [], [0]), (1000, 2000, [1000], [2000])],
)
def test_documents_are_encoded_in_the_order_asked_for(encoder, ids_of, bos, eos, before, after):
    encode = encoder('{"text": "ab"}\n{"text": "春"}\n', '{"text": "c"}\n', bos=bos, eos=eos)
    documents = {number: [*before, *ids_of(text), *after] for number, text in enumerate(("ab", "春", "c"))}
    for numbers in ([0, 1, 2], [2, 0], [1], [0, 0]):
        assert_group(encode(numbers), [documents[number] for number in numbers])


def test_documents_without_text_are_left_out_and_bad_ones_counted(encoder, ids_of):
    encode = encoder(LINES, bos=7, eos=8, on_error="skip")
    assert_group(encode(range(6)), [[7, *ids_of(text), 8] for text in ("ab", "春", "c<eos>")], skipped=2)
    assert_group(encode([1]), [])
    assert_group(encode([2, 4]), [], skipped=2)
    assert_group(encode([]), [])


def test_a_bad_record_is_an_error_with_its_place(encoder, ids_of):
    encode = encoder(LINES)
    with pytest.raises(DataError, match=r"a\.jsonl:3: no field 'text'; the fields here are: txt; .*on_error=skip"):
        encode([0, 2, 4])
    with pytest.raises(DataError, match=r"a\.jsonl:5: field 'text' must be a string, it is int"):
        encode([4])
    assert_group(encode([3]), [ids_of("春")])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_prepared_documents_and_texts_go_together(encoder, ids_of, tokenizer, tmp_path, dtype):
    (tmp_path / "p.jsonl").write_text('{"text": "xy"}\n{"text": "z"}\n')
    prepare([str(tmp_path / "p.jsonl")], tmp_path / "out", tokenizer, text=TextFormat(), workers=0)
    file = tmp_path / "out" / "tokens-00000.npy"
    np.save(file, np.load(file).astype(dtype))
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"txt": ""}\n')
    encode = encoder.of([tmp_path / "out", tmp_path / "a.jsonl"], bos=7, eos=8, on_error="skip")
    expected = [[7, *ids_of(text), 8] for text in ("z", "ab", "xy")]
    assert_group(encode([1, 2, 3, 0]), expected, skipped=1)
    assert_group(encode([1, 0]), [expected[0], expected[2]])


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were encoded."""
    texts = []
    encode_batch = Tokenizer.encode_batch

    def recording(self, batch):
        texts.extend(batch)
        return encode_batch(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", recording)
    return texts


def test_documents_of_a_small_corpus_are_encoded_once(encoder, ids_of, encoded):
    encode = encoder(LINES, bos=7, on_error="skip")
    for _ in range(3):  # the empty one counts nothing, the bad one each time
        assert_group(encode([0, 3, 0, 2, 2]), [[7, *ids_of(text)] for text in ("ab", "春", "ab")], skipped=2)
        assert_group(encode([5, 0]), [[7, *ids_of(text)] for text in ("c<eos>", "ab")])
    assert encoded == ["ab", "春", "c<eos>"]


def test_of_a_large_corpus_the_last_group_alone_is_kept(encoder, ids_of, encoded, monkeypatch):
    encode = encoder("".join(f'{{"text": "{n}"}}\n' for n in range(9)))
    monkeypatch.setattr("stellarbyte_jax.data.encode._KEPT_BYTES", 3 * 300)
    for numbers in ([0], [1, 2], [0, 3], [3, 4], [3], [0]):
        assert_group(encode(numbers), [ids_of(str(number)) for number in numbers])
    assert encoded == ["0", "1", "2", "3", "4", "0"]
    assert_group(pickle.loads(pickle.dumps(encode))([0]), [ids_of("0")])
    assert encoded[6:] == ["0"], "what is kept does not travel"


def test_an_encoder_travels_to_a_worker(encoder, ids_of):
    encode = encoder('{"text": "ab"}\n', bos=7)
    assert len(pickle.dumps(encode)) < 2000, "the tokenizer travels as a path"
    assert_group(pickle.loads(pickle.dumps(encode))([0]), [[7, *ids_of("ab")]])


def numbers_of(groups, count=None):
    return [number for index in range(len(groups) if count is None else count) for number in groups[index]]


def test_groups_in_order_hold_every_document_once():
    count = 2 * GROUP_DOCUMENTS + 5
    groups = document_groups(count)
    assert [len(groups[i]) for i in range(len(groups))] == [GROUP_DOCUMENTS, GROUP_DOCUMENTS, 5]
    assert numbers_of(groups) == list(range(count))
    assert all(type(groups[i]) is list for i in range(3))
    assert numbers_of(document_groups(1, epochs=3)) == [0, 0, 0]


def test_each_epoch_is_shuffled_anew_and_a_seed_repeats():
    count = GROUP_DOCUMENTS + 7
    numbers = numbers_of(document_groups(count, seed=3, epochs=2))
    first, second = numbers[:count], numbers[count:]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second and first != list(range(count))
    assert numbers_of(document_groups(count, seed=3, epochs=2)) == numbers
    assert numbers_of(document_groups(count, seed=4, epochs=2)) != numbers
    assert numbers_of(document_groups(count, seed=3 + 2**32, epochs=2)) == numbers, "seeds of more than 32 bits"


@pytest.mark.parametrize("count", [5, GROUP_DOCUMENTS, GROUP_DOCUMENTS + 8])
def test_more_epochs_go_on_where_fewer_ended(count):
    one, two = (document_groups(count, seed=3, epochs=epochs) for epochs in (1, 2))
    assert [two[i] for i in range(len(one))] == [one[i] for i in range(len(one))]
    left = [number for i in range(len(one), len(two)) for number in two[i]]
    assert sorted(left) == list(range(count))


def test_without_an_end_the_epochs_go_on():
    groups = document_groups(GROUP_DOCUMENTS, seed=3, epochs=None)
    assert len(groups) > 10**9
    assert sorted(groups[10**6]) == list(range(GROUP_DOCUMENTS)) and groups[10**6] != groups[0]


def test_no_process_and_one_process_give_the_groups_in_order(encoder, ids_of):
    texts = [f"<{number}>" for number in range(2 * GROUP_DOCUMENTS + 3)]
    encode = encoder("".join(f'{{"text": "{text}"}}\n' for text in texts), eos=8)
    groups = document_groups(len(texts)).map(lambda numbers: {**encode(numbers), "process": os.getpid()})
    places = {}
    for workers in (0, 1):
        iterator = iterate_groups(groups, workers)
        found = list(iterator)
        iterator.close()
        assert len(found) == 3
        for index, group in enumerate(found):
            part = texts[index * GROUP_DOCUMENTS : (index + 1) * GROUP_DOCUMENTS]
            assert_group(group, [[*ids_of(text), 8] for text in part])
        places[workers] = {group["process"] for group in found}
    assert places[0] == {os.getpid()} and len(places[1]) == 1 and places[1] != places[0]


def test_no_process_is_started_for_no_group():
    assert list(iterate_groups(document_groups(3)[1:], 4)) == []


@pytest.mark.parametrize("opened", [True, False])
def test_a_file_that_became_shorter_is_not_skipped(encoder, tmp_path, opened):
    """Leaving out what is gone would train on less than was asked for, and say nothing."""
    encode = encoder(LINES, on_error="skip")
    if opened:
        encode([0])
    os.truncate(tmp_path / "a.jsonl", 20)
    if not opened:
        sources._open_lines.cache_clear()
    with pytest.raises(DataError, match=r"a\.jsonl became shorter"):
        encode(range(6))


@pytest.mark.parametrize("left", [3, 100, -1])
@pytest.mark.parametrize("file", ["tokens-00000.npy", "offsets-00000.npy"])
def test_a_shard_that_was_cut_before_it_was_opened_became_shorter(encoder, tokenizer, tmp_path, file, left):
    (tmp_path / "p.jsonl").write_text('{"text": "xy"}\n')
    prepare([str(tmp_path / "p.jsonl")], tmp_path / "out", tokenizer, text=TextFormat(), workers=0)
    encode = encoder.of([tmp_path / "out"])
    shard = tmp_path / "out" / file
    os.truncate(shard, left % shard.stat().st_size)
    sources._open_shard.cache_clear()
    with pytest.raises(ValueError, match=rf"{file} .*became shorter"):
        encode([0])

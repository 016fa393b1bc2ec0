"""Data sets on disk, in the layout of ``save_to_disk`` of the datasets package."""

import json
import re

import pyarrow as pa
import pytest
from helpers.hostile import is_one_line
from helpers.record_files import RECORDS

from stellarbyte_jax.data.sources import DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat, read_text
from stellarbyte_jax.data.tokenizer_corpus import TokenizerCorpus

STATE = {
    "_fingerprint": "6f2f3f1b2c1d4e5f",
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": None,
}


def save(path, *tables, batch=7, **state):
    """Writes tables as the files of a data set, each as a stream of record batches."""
    path.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=batch)
    (path / "dataset_info.json").write_text(json.dumps({"features": {}}))
    files = [{"filename": name} for name in names]
    (path / "state.json").write_text(json.dumps({**STATE, "_data_files": files, **state}))


def _open(tmp_path, path, columns=("text",)):
    return open_corpus(
        [str(path)], setting="data.train", columns=columns, fingerprint="f", cache_dir=tmp_path / "cache"
    )


def _texts(corpus, text=None):
    return [read_text(*corpus.locate(i), text or TextFormat()) for i in range(len(corpus))]


def _tables(*parts):
    return [pa.Table.from_pylist([{"id": 3, **record} for record in part]) for part in parts]


def test_the_rows_of_all_files_are_read_in_their_order(tmp_path):
    save(tmp_path / "set", *_tables(RECORDS[:20], RECORDS[20:]))
    (tmp_path / "set" / "cache-1.arrow").write_bytes(b"another file, which state.json does not name")
    text = TextFormat(("title", "text"))
    corpus = _open(tmp_path, tmp_path / "set", text.columns)
    assert _texts(corpus, text) == [f"{r['title']}\n{r['text']}" for r in RECORDS]
    assert _texts(_open(tmp_path, tmp_path / "s*t")) == [r["text"] for r in RECORDS]
    tokenizer_corpus = TokenizerCorpus(
        name="c", paths=(str(tmp_path / "set"),), only={"title": "1$"}, cache_dir=str(tmp_path / "cache")
    )
    assert list(tokenizer_corpus.documents()) == [r["text"] for r in RECORDS if r["title"].endswith("1")]


def test_state_says_which_files_and_in_which_order(tmp_path):
    names = [{"filename": f"data-{number:05d}-of-00003.arrow"} for number in (2, 0)]
    save(tmp_path / "set", *_tables(RECORDS[:2], RECORDS[2:4], RECORDS[4:6]), _data_files=names)
    assert _texts(_open(tmp_path, tmp_path / "set")) == [r["text"] for r in RECORDS[4:6] + RECORDS[:2]]


def test_batches_of_many_rows_lose_none(tmp_path):
    table = pa.table({"text": [f"{number}" for number in range(2500)]})
    save(tmp_path / "set", table, batch=2500)
    assert _texts(_open(tmp_path, tmp_path / "set")) == table["text"].to_pylist()


KINDS = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_columns_of_every_kind_of_string(tmp_path, kind):
    table = pa.table({"text": pa.array(["a", None, "春"]).cast(kind)})
    save(tmp_path / "set", table)
    corpus = _open(tmp_path, tmp_path / "set")
    assert [read_text(*corpus.locate(i), TextFormat()) for i in (0, 2)] == ["a", "春"]
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow row 2: field 'text' must be .*leave such rows"):
        read_text(*corpus.locate(1), TextFormat())


def _cut(path, count):
    file = path / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-count])


def _end(path):
    """Cuts the file where a record batch ends: what is left looks like a stream without an end."""
    _cut(path, 8)


DAMAGED = {
    "no column": (lambda p: None, ("body",), r"arrow: no column 'body'; it has id, text, title; name one of these"),
    "no strings": (lambda p: None, ("id",), r"arrow: column 'id' must hold strings, it holds int64"),
    "cut": (lambda p: _cut(p, 100), ("text",), r"arrow: the Arrow stream is cut off"),
    "cut between batches": (_end, ("text",), r"arrow: the Arrow stream is cut off"),
    "no stream": (
        lambda p: (p / "data-00000-of-00001.arrow").write_bytes(b"ARROW1" * 9),
        ("text",),
        r"arrow: cannot be read as a stream of Arrow batches",
    ),
    "missing": (
        lambda p: (p / "data-00000-of-00001.arrow").unlink(),
        ("text",),
        r"set: data-00000-of-00001\.arrow is missing; copy the data set again",
    ),
    "state": (lambda p: (p / "state.json").write_text("{"), ("text",), r"state\.json.*copy the data set again"),
    "no list": (lambda p: (p / "state.json").write_text("{}"), ("text",), r"state\.json: no list _data_files"),
    "elsewhere": (
        lambda p: (p / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}'),
        ("text",),
        r"_data_files must name files of this directory",
    ),
    "none": (
        lambda p: (p / "state.json").write_text('{"_data_files": []}'),
        ("text",),
        "has no rows: it was saved without any",
    ),
    "selection": (
        lambda p: (p / "state.json").write_text(
            '{"_data_files": [{"filename": "a"}], "_indices_files": [{"filename": "indices.arrow"}]}'
        ),
        ("text",),
        r"selection of rows .*flatten_indices\(\)\.save_to_disk",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_read_is_one_line(tmp_path, case):
    damage, columns, message = DAMAGED[case]
    save(tmp_path / "set", *_tables(RECORDS))
    damage(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        _open(tmp_path, tmp_path / "set", columns)
    assert is_one_line(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("named", "begin", "guess"),
    [
        ("sets", "{sets} holds", "train"),
        ("sets/trian", r"{sets}/trian does not exist \(.*\); {sets} holds", "train"),
        ("sets/validation", r"{sets}/validation does not exist \(.*\); {sets} holds", "valid"),
        ("sets/holdout", r"{sets}/holdout does not exist \(.*\); {sets} holds", "train"),
    ],
)
def test_of_several_splits_one_is_to_be_named(tmp_path, named, begin, guess):
    """The one for training, where the name is not nearly another one's."""
    for split in ("train", "valid", "extra"):
        save(tmp_path / "sets" / split, *_tables(RECORDS[:3]))
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["extra", "train", "valid"]}')
    sets = re.escape(str(tmp_path / "sets"))
    with pytest.raises(DataError) as caught:
        _open(tmp_path, tmp_path / named)
    message = (
        f"data\\.train: {begin.format(sets=sets)} the splits train, extra, valid: name one, such as {sets}/{guess}"
    )
    assert re.fullmatch(message, str(caught.value)), caught.value
    assert is_one_line(caught.value)
    assert len(_open(tmp_path, tmp_path / "sets" / "train")) == 3


def test_a_data_set_without_its_splits_is_named(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(
        DataError, match=r"sets holds no split \(no folder with state\.json\); copy the data set again$"
    ):
        _open(tmp_path, tmp_path / "sets")
    save(tmp_path / "mine" / "other", *_tables(RECORDS[:1]))  # a data set of its own, no split
    for absent in ("sets/train", "elsewhere/train", "mine/train"):
        with pytest.raises(DataError, match=rf"{absent} does not exist \([^;]*$"):
            _open(tmp_path, tmp_path / absent)


NO_ROWS = {
    "no batch": _tables(RECORDS[:1])[0].slice(0, 0),
    "a column without a type": pa.table({"text": pa.nulls(0), "title": pa.nulls(0)}),
    "no column": pa.table({}),
}


@pytest.mark.parametrize("kind", NO_ROWS)
def test_files_without_rows_add_nothing(tmp_path, kind):
    save(tmp_path / "set", NO_ROWS[kind], *_tables(RECORDS[:2]), NO_ROWS[kind])
    corpus = _open(tmp_path, tmp_path / "set")
    assert _texts(corpus) == [r["text"] for r in RECORDS[:2]] and len(corpus.sources) == 1
    save(tmp_path / "none", NO_ROWS[kind], NO_ROWS[kind])
    with pytest.raises(DataError) as caught:
        _open(tmp_path, tmp_path / "none")
    assert str(caught.value) == (
        f"data.train: none of the 2 files that '{tmp_path / 'none'}' names holds text, such as "
        f"{tmp_path / 'none' / 'data-00000-of-00002.arrow'}: it has no rows; name files with text"
    )


def test_a_batch_without_rows_is_as_none(tmp_path):
    save(tmp_path / "set", *_tables(RECORDS[:2]), NO_ROWS["a column without a type"])
    with pa.OSFile(str(tmp_path / "set" / "data-00001-of-00002.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, schema := pa.schema([("text", pa.null())])) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist([], schema))
    assert _texts(_open(tmp_path, tmp_path / "set")) == [r["text"] for r in RECORDS[:2]]


def test_a_stream_that_is_cut_off_before_its_rows_is_not_taken_for_one_without(tmp_path):
    save(tmp_path / "set", *_tables(RECORDS[:2]), NO_ROWS["no batch"])
    file = tmp_path / "set" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: the Arrow stream is cut off"):
        _open(tmp_path, tmp_path / "set")


def test_a_batch_without_rows_goes_before_others(tmp_path):
    table = _tables(RECORDS[:2])[0]
    save(tmp_path / "set", table)
    with pa.OSFile(str(tmp_path / "set" / "data-00000-of-00001.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            for rows in ([], RECORDS[:2]):
                stream.write_batch(pa.RecordBatch.from_pylist([{"id": 3, **row} for row in rows], table.schema))
    assert _texts(_open(tmp_path, tmp_path / "set")) == [r["text"] for r in RECORDS[:2]]


def test_a_data_set_that_was_saved_without_rows_adds_nothing(tmp_path):
    """As ``save_to_disk`` writes one: a state that names no files (huggingface/datasets, pull request 8385)."""
    save(tmp_path / "sets" / "train", *_tables(RECORDS[:3]))
    save(tmp_path / "sets" / "test")
    texts = [r["text"] for r in RECORDS[:3]]
    assert _texts(_open(tmp_path, tmp_path / "sets" / "t*")) == texts
    cache = str(tmp_path / "cache")
    corpus = TokenizerCorpus(name="c", paths=(str(tmp_path / "sets" / "t*"),), cache_dir=cache)
    assert list(corpus.documents()) == texts
    alone = str(tmp_path / "sets" / "test")
    message = f"{re.escape(alone)} has no rows: it was saved without any; name a data set with rows$"
    with pytest.raises(DataError, match=f"^data.train: {message}"):
        _open(tmp_path, alone)
    with pytest.raises(DataError, match=f"^corpus 'c': {message}"):
        list(TokenizerCorpus(name="c", paths=(alone,), cache_dir=cache).documents())

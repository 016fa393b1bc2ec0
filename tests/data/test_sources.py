"""Reading: every format gives the same records, and what is wrong is named with its place."""

import glob
import gzip
import os
import re
import resource

import numpy as np
import pytest
from helpers.hostile import is_one_line
from helpers.record_files import FORMATS, RECORDS, lines_of, write_records

from stellarbyte_jax.data import sources
from stellarbyte_jax.data.sources import DataError, open_corpus, open_lines
from stellarbyte_jax.data.text import TextFormat, read_text


def _open(tmp_path, *patterns, columns=("text",)):
    return open_corpus(
        [str(p) for p in patterns], setting="data.train", columns=columns, fingerprint="f", cache_dir=tmp_path / "cache"
    )


def _texts(corpus, text=None):
    text = text or TextFormat()
    return [read_text(*corpus.locate(i), text) for i in range(len(corpus))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_text(tmp_path, name):
    write_records(tmp_path / name, RECORDS)
    text = TextFormat(("title", "text"))
    corpus = _open(tmp_path, tmp_path / name, columns=text.columns)
    assert _texts(corpus, text) == [f"{r['title']}\n{r['text']}" for r in RECORDS]


def test_conversion_and_index_are_made_once_and_anew_when_the_file_changes(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_records(path, RECORDS)
    _open(tmp_path, path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert len(before) == 2
    _open(tmp_path, path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == before
    path.write_bytes(gzip.compress(lines_of(RECORDS[:3])))
    os.utime(path, ns=(1, 1))
    assert len(_open(tmp_path, path)) == 3


def test_a_file_of_the_same_size_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    for number, texts in enumerate((["a", "bcd"], ["abc", "d"]), 1):
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
        os.utime(path, ns=(number, number))
        assert _texts(_open(tmp_path, path)) == texts


def test_other_columns_are_converted_anew(tmp_path):
    write_records(tmp_path / "a.parquet", RECORDS[:3])
    for fields in (("text",), ("title", "text")):
        text = TextFormat(fields)
        corpus = _open(tmp_path, tmp_path / "a.parquet", columns=text.columns)
        assert _texts(corpus, text) == ["\n".join(r[field] for field in fields) for r in RECORDS[:3]]


@pytest.mark.parametrize(
    ("name", "columns"), [("a.jsonl.gz", ("text",)), ("a.parquet", ("text", "title"))], ids=["lines", "parquet"]
)
def test_a_file_is_converted_once_for_what_takes_the_same_of_it(tmp_path, name, columns):
    """Of lines, the whole; of columns, the same ones in whatever order."""
    write_records(tmp_path / name, RECORDS[:3])
    for taken in (columns, ("title", "text")):
        _open(tmp_path, tmp_path / name, columns=taken)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_home_directory_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "a.jsonl", RECORDS[:2])
    for name in ("~/a.jsonl", "~/*.jsonl"):
        corpus = open_corpus([name], setting="data.train", columns=("text",), fingerprint="f", cache_dir="~/kept")
        assert _texts(corpus) == [r["text"] for r in RECORDS[:2]]
    assert list((tmp_path / "kept").iterdir()) and not (tmp_path / "~").exists()
    with pytest.raises(DataError, match=r"^data\.train: ~no\.body/x: there is no home directory of ~no\.body: write"):
        open_corpus(["~no.body/x"], setting="data.train", columns=("text",), fingerprint="f")


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "[ab]/x.jsonl"])
def test_a_path_that_exists_is_no_pattern(tmp_path, name):
    """Such a path as a pattern would name the other file, or none."""
    for number, path in enumerate((tmp_path / name, tmp_path / "a1.jsonl", tmp_path / "a" / "x.jsonl")):
        path.parent.mkdir(exist_ok=True)
        write_records(path, RECORDS[number : number + 1])
    assert _texts(_open(tmp_path, tmp_path / name)) == [RECORDS[0]["text"]]


def test_two_stars_descend_into_folders(tmp_path):
    for number, folder in enumerate(("", "b", "b/c")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        write_records(tmp_path / "in" / folder / "a.jsonl", RECORDS[number : number + 1])
    assert _texts(_open(tmp_path, tmp_path / "in" / "**" / "*.jsonl")) == [r["text"] for r in RECORDS[:3]]


def test_globs_and_many_files_join_in_order(tmp_path, monkeypatch):
    found = glob.glob  # its order is that of the file system
    monkeypatch.setattr(glob, "glob", lambda *names, **more: sorted(found(*names, **more), reverse=True))
    for number in (2, 0, 1):
        write_records(tmp_path / f"part-{number}.jsonl", RECORDS[number * 10 : number * 10 + 10])
    corpus = _open(tmp_path, tmp_path / "part-*.jsonl")
    assert _texts(corpus) == [r["text"] for r in RECORDS[:30]]


def test_a_damaged_index_is_named(tmp_path):
    write_records(tmp_path / "a.jsonl", RECORDS)
    _open(tmp_path, tmp_path / "a.jsonl")
    (index,) = (tmp_path / "cache").iterdir()
    for content in (b"", index.read_bytes()[:-8], b"something else"):
        index.write_bytes(content)
        sources._open_lines.cache_clear()
        with pytest.raises(DataError, match=r"\.lines\.npy is damaged \(.+\); delete it, it is made again"):
            _open(tmp_path, tmp_path / "a.jsonl")


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines_of(RECORDS[:2]))
    assert _texts(_open(tmp_path, path)) == [r["text"] for r in RECORDS[:2]]


def test_a_byte_order_mark_before_a_blank_line_is_no_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + lines_of(RECORDS[:2]))
    assert _texts(_open(tmp_path, path)) == [r["text"] for r in RECORDS[:2]]


def test_a_parquet_value_that_is_not_utf8_is_one_bad_record(tmp_path):
    """Arrow's writers do not check; the rows beside it are as good as ever."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.py_buffer(np.asarray([0, 1, 3, 4], np.int32).tobytes())
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xe9\xffc")])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    corpus = _open(tmp_path, tmp_path / "a.parquet")
    assert [read_text(*corpus.locate(i), TextFormat()) for i in (0, 2)] == ["a", "c"]
    with pytest.raises(DataError, match=r"a\.parquet row 2: not valid UTF-8"):
        read_text(*corpus.locate(1), TextFormat())


@pytest.mark.parametrize("log", [27, 28, 30])
def test_a_zstd_stream_may_have_a_long_window(tmp_path, log):
    import zstandard

    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressor.compress(lines_of(RECORDS)) + compressor.flush())
    assert _texts(_open(tmp_path, path)) == [r["text"] for r in RECORDS]


def test_a_file_that_becomes_shorter_is_one_error_that_names_it(tmp_path):
    """Not a signal that ends the process."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(RECORDS))
    corpus = _open(tmp_path, path)
    assert len(_texts(corpus)) == len(RECORDS)
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"a\.jsonl became shorter while it was read: .* the checkpoints are kept"):
        _texts(corpus)


@pytest.mark.parametrize("left", [0, 100, -1])
@pytest.mark.parametrize("row", [0, -1])
def test_a_file_that_was_cut_before_it_was_opened_became_shorter(tmp_path, left, row):
    """As in a worker, which opens files when it reads their first line: not bad JSON, whatever is left of a line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(RECORDS))
    size = path.stat().st_size
    corpus = _open(tmp_path, path)
    os.truncate(path, left % size)
    sources._open_lines.cache_clear()
    found = rf"a\.jsonl became shorter: it has {left % size} bytes and had {size}\. .* the checkpoints are kept"
    with pytest.raises(DataError, match=found):
        read_text(*corpus.locate(row % len(corpus)), TextFormat())


def test_lines_that_were_added_later_belong_to_no_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(RECORDS).rstrip())
    corpus = _open(tmp_path, path)
    path.write_bytes(lines_of([*RECORDS, *RECORDS]))
    sources._open_lines.cache_clear()
    assert _texts(corpus) == [record["text"] for record in RECORDS]


def test_a_converted_file_that_was_cut_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines_of(RECORDS)))
    _open(tmp_path, path)
    (plain,) = (tmp_path / "cache").glob("*.jsonl")
    os.truncate(plain, 100)
    sources._open_lines.cache_clear()
    with pytest.raises(DataError, match=r"\.jsonl is damaged \(.* became shorter.*\); delete it, it is made again"):
        _open(tmp_path, path)


def test_the_content_of_files_is_their_size_beginning_and_end(tmp_path):
    def content(text, name="a.jsonl"):
        path = tmp_path / name
        path.write_bytes(text)
        ((named, found),) = _open(tmp_path, path).contents
        assert named == str(path)
        return found

    lines = [b'{"text": "%07d"}\n' % i for i in range(20_000)]
    found = content(b"".join(lines))
    assert content(b"".join(lines), "b.jsonl") == found
    for changed in (lines[:-1], [lines[1], *lines[1:]], [*lines[:-1], lines[0]], [*lines[:9000], *lines[9001:]]):
        assert content(b"".join(changed)) != found


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"a text {i}" for i in range(2000)]}), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[500:600] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        _open(tmp_path, path)


EMPTY = r"data\.train: [^ ]*a\.jsonl[.gz]* holds no text: it is empty, or its lines are blank; name files with text"
BAD_FILES = {
    "missing": ("none.jsonl", None, r"none\.jsonl does not exist"),
    "glob": ("none*.jsonl", None, r"no file matches '.*none\*\.jsonl'"),
    "empty": ("a.jsonl", b"", EMPTY),
    "blank": ("a.jsonl", b"\n\n  \n", EMPTY),
    "kind": ("a.csv", b"hello", r"a\.csv: unknown kind of data file; use \.jsonl.*\.arrow, \.txt or"),
    "gzip": ("a.jsonl.gz", b"hello", r"a\.jsonl\.gz: damaged or not gzip"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b"hello" * 1000)[:-12], r"a\.jsonl\.gz: damaged or not gzip"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), EMPTY),
    "no bytes gzip": ("a.jsonl.gz", b"", r"a\.jsonl\.gz has no bytes, as no file of this kind does; fetch or write it"),
    "no bytes zstd": ("a.jsonl.zst", b"", r"a\.jsonl\.zst has no bytes"),
    "no bytes parquet": ("a.parquet", b"", r"a\.parquet has no bytes"),
    "zstd": ("a.jsonl.zst", b"hello", r"a\.jsonl\.zst: damaged or not zstd"),
    "parquet": ("a.parquet", b"hello", r"a\.parquet: cannot be read as Parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, case):
    name, content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _open(tmp_path, tmp_path / name)
    leftovers = [p for p in (tmp_path / "cache").glob("**/*") if p.name.startswith(".partial")]
    assert leftovers == []


def _write_without_text(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.nulls(0)}), path)  # as writers type a column of nothing
    elif path.suffix == ".txt":
        path.write_text("\n\u3000\n")
    else:
        write_records(path, [])


@pytest.mark.parametrize("name", [*FORMATS, "a.txt"])
def test_files_without_text_among_others_add_nothing(tmp_path, name):
    """Data sets that many processes write have such parts; alone, or all of a pattern, they are a mistake."""
    for number in (0, 2):
        _write_without_text(tmp_path / f"{number}{name}")
    if name == "a.txt":
        (tmp_path / f"1{name}").write_text(RECORDS[0]["text"])
    else:
        write_records(tmp_path / f"1{name}", RECORDS[:1])
    corpus = _open(tmp_path, tmp_path / f"*{name}")
    assert _texts(corpus) == [RECORDS[0]["text"]]
    assert corpus.listing == [(f"1{name}", 1)] and len(corpus.contents) == 1
    why = "it has no rows" if name == "a.parquet" else "it is empty, or its lines are blank"
    first, both = tmp_path / f"0{name}", str(tmp_path / f"[02]{name}")
    for pattern, what in (
        (first, f"{first} holds no text"),
        (both, f"none of the 2 files that {both!r} names holds text, such as {first}"),
    ):
        with pytest.raises(DataError) as caught:
            _open(tmp_path, tmp_path / f"1{name}", pattern)
        assert str(caught.value) == f"data.train: {what}: {why}; name files with text"
        assert is_one_line(caught.value)


def test_files_that_are_left_out_are_told(tmp_path, caplog):
    caplog.set_level("INFO", "stellarbyte_jax")
    (tmp_path / "0.jsonl").touch()
    write_records(tmp_path / "1.jsonl", RECORDS[:1])
    for pattern in ("1.jsonl", "*.jsonl"):
        _open(tmp_path, tmp_path / pattern)
    assert caplog.messages == [f"data.train: 1 of the 2 files of {tmp_path}/*.jsonl hold no text"]


def test_a_cut_zstd_stream_is_refused(tmp_path):
    import zstandard

    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(np.random.default_rng(0).bytes(100_000))[:-100])
    with pytest.raises(DataError, match="the zstd stream is cut off"):
        _open(tmp_path, path)


def test_parquet_columns_are_checked(tmp_path):
    path = tmp_path / "a.parquet"
    write_records(path, [{"content": "a", "id": 1}])
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; it has content, id"):
        _open(tmp_path, path)
    with pytest.raises(DataError, match=r"a\.parquet: column 'id' must hold strings, it holds int64"):
        _open(tmp_path, path, columns=("id",))


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (["x\n\x1b[2J" * 10**5], ["a"], "no column 'text'; it has x"),
        ([str(i) for i in range(10**4)], ["a"], "no column 'text'; it has 0, 1, 2, 3, 4 and 9995 more"),
        (["text"], [{"x\n" * 10**4: 1}], "column 'text' must hold strings, it holds struct<x"),
        (["text", "text"], ["a"], "2 columns are called 'text'; rename them or name another"),
    ],
    ids=["hostile", "many", "type", "twice"],
)
def test_what_is_said_of_parquet_columns_is_one_short_line(tmp_path, names, values, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array(values)] * len(names), names=names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"a\\.parquet: {re.escape(message)}") as caught:
        _open(tmp_path, tmp_path / "a.parquet")
    assert is_one_line(caught.value)


def test_nothing_named_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.train is empty"):
        _open(tmp_path)


def test_an_unwritable_cache_is_named(tmp_path):
    write_records(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write to the cache directory .* choose another cache_dir"):
        _open(tmp_path, tmp_path / "a.jsonl")


def test_an_index_that_cannot_be_written_says_why(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write .*lines.npy: File too large; a limit .*ulimit -f"):
            open_lines(path, tmp_path / "cache", ("text",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "cache").exists()
    assert open_lines(path, tmp_path / "cache", ("text",)).documents == 100


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_converted_file_for_which_there_is_no_room_is_no_damaged_file(tmp_path, name):
    """More than one buffer, so that a write fails while the file is still read."""
    write_records(tmp_path / name, [{"text": "x" * 50_000}] * 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write .*\.jsonl: .*File too large; a limit .*ulimit -f"):
            _open(tmp_path, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_another_process_has_begun_to_fill_is_kept(tmp_path, monkeypatch):
    """Two runs may start at once with a cache that neither has made yet; one of them fails."""
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    cache = tmp_path / "cache"

    def damaged(path, out, columns):
        (cache / "theirs.jsonl").touch()
        raise DataError("damaged")

    monkeypatch.setitem(sources.CONVERTERS, ".jsonl.gz", damaged)
    with pytest.raises(DataError, match="damaged"):
        sources.open_lines(tmp_path / "a.jsonl.gz", cache, ("text",))
    assert [path.name for path in cache.iterdir()] == ["theirs.jsonl"]

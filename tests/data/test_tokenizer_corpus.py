"""Corpora of a tokenizer: read as training reads its data, and sampled by a hash of each text."""

import re

import pytest
from helpers.record_files import BAD_LINES, FORMATS, RECORDS, lines_of, write_records

from stellarbyte_jax.data.sources import DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat, read_text
from stellarbyte_jax.data.tokenizer_corpus import HELD_OUT_SHARE, TokenizerCorpus, draw
from stellarbyte_jax.tokenizer.training.evaluation import pieces_of


def _corpus(tmp_path, *paths, **more):
    return TokenizerCorpus(name="c", paths=tuple(map(str, paths)), cache_dir=str(tmp_path / "cache"), **more)


def _read(tmp_path, *paths, **more):
    return list(_corpus(tmp_path, *paths, **more).documents())


def _as_training_reads(tmp_path, path):
    corpus = open_corpus(
        [str(path)], setting="data.train", columns=("text",), fingerprint="f", cache_dir=tmp_path / "cache"
    )
    return [read_text(*corpus.locate(i), TextFormat()) for i in range(len(corpus))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_texts_of_training(tmp_path, name):
    write_records(tmp_path / name, RECORDS)
    expected = [r["text"] for r in RECORDS]
    assert _read(tmp_path, tmp_path / name) == _as_training_reads(tmp_path, tmp_path / name) == expected
    assert _read(tmp_path, tmp_path / name, text_field="title", only={"text": "document 4[23]"}) == ["t42", "t43"]


CONTENTS = {
    "blank lines": b'\n{"text": "a"}\n \t \n{"text": "b"}\n\n\n',
    "no line end": b'{"text": "a"}\n{"text": "b"}',
    "byte order mark": b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
    "carriage returns": b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
}


@pytest.mark.parametrize("case", CONTENTS)
def test_lines_are_those_of_training(tmp_path, case):
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENTS[case])
    assert _read(tmp_path, path) == _as_training_reads(tmp_path, path) == ["a", "b"]


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_its_place(tmp_path, case):
    line, message = BAD_LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(
        DataError, match=message + ".*mend the line or leave such lines out with --on-error skip$"
    ) as caught:
        _read(tmp_path, path)
    assert "data." not in str(caught.value)  # settings of training


def test_bad_records_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    """Those that training leaves out, and files of one document that are no text."""
    lines = [b'{"text": "a"}', *(line for line, _ in BAD_LINES.values()), b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(lines))
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    corpus = _corpus(tmp_path, tmp_path / "a.jsonl", tmp_path / "latin.txt", on_error="skip")
    found = []
    assert list(corpus.documents(lambda: found.append(1))) == ["a", "b"]
    assert len(found) == len(BAD_LINES) + 1
    drawn = draw(corpus, pieces_of(), 10**9, 10**9)
    assert drawn.skipped == len(BAD_LINES) + 1 and drawn.training_bytes + sum(map(len, drawn.held_out)) == 2
    (tmp_path / "b.jsonl").write_bytes(lines[1])
    with pytest.raises(DataError, match="corpus 'c' holds no text: 1 lines were skipped; check"):
        draw(_corpus(tmp_path, tmp_path / "b.jsonl", on_error="skip"), pieces_of(), 10, 10)


def test_a_bad_row_of_parquet_is_named(tmp_path):
    write_records(tmp_path / "a.parquet", [*RECORDS[:4], {"text": None, "title": "t"}])
    with pytest.raises(DataError, match=r"a\.parquet row 5: field 'text' must be a string"):
        _read(tmp_path, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; it has text, title"):
        _read(tmp_path, tmp_path / "a.parquet", text_field="body")


def test_records_that_the_expressions_leave_out_need_no_usable_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "k": "x1"}\n{"text": "\\ud800", "k": "y"}\n')
    assert _read(tmp_path, path, only={"k": "x."}) == ["a"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'source'; the fields here are: text, k"):
        _read(tmp_path, path, only={"source": "x"})
    with pytest.raises(ValueError, match=r"'\(', for field 'k', is no regular expression"):
        _corpus(tmp_path, path, only={"k": "("})


def test_any_other_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.py").write_text("春 = 1\n", encoding="utf-8")
    (tmp_path / "empty.py").touch()
    assert _read(tmp_path, tmp_path / "a.txt", tmp_path / "*.py", only={"k": "x"}) == ["one\ntwo\n", "春 = 1\n"]
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbfone\nt \xe9t")
    with pytest.raises(
        DataError,
        match=r"latin\.txt:2:3: not valid UTF-8 \(save the file as UTF-8\); .*files out with --on-error skip$",
    ):
        _read(tmp_path, tmp_path / "latin.txt")


def test_paths_and_patterns(tmp_path):
    """A path that exists is no pattern, two stars descend, folders are left out, and no file is read twice."""
    for name in ("a[1].txt", "a1.txt", "in/x.txt", "in/deep/y.txt", "in/deep/z.txt/w.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert _read(tmp_path, tmp_path / "a[1].txt") == ["a[1].txt"]
    everything = ["in/deep/y.txt", "in/deep/z.txt/w.txt", "in/x.txt"]
    assert _read(tmp_path, tmp_path / "in" / "**" / "*.txt") == everything
    assert _read(tmp_path, tmp_path / "in" / "**" / "*.txt", tmp_path / "in" / "*.txt") == everything
    assert _read(tmp_path, tmp_path / "in" / "*.txt", tmp_path / "in" / "**" / "*.txt") == everything, "sorted"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.txt", "corpus 'c': .*absent.txt does not exist"),
        ("absent*", r"corpus 'c': no file matches '.*absent\*'"),
        ("folder", "corpus 'c': .*folder names only directories; name the files in them with a glob"),
        ("empty.jsonl", r"corpus 'c': .*empty\.jsonl holds no text: it is empty, or its lines are blank; name files"),
        ("empty.*", r"corpus 'c': none of the 2 files that '.*empty\.\*' names holds text, such as .*empty\.jsonl"),
    ],
)
def test_paths_that_name_no_text(tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.py").touch()
    with pytest.raises(DataError, match=message):
        _read(tmp_path, tmp_path / path)


def test_a_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(RECORDS))
    with pytest.raises(DataError, match="corpus 'c' holds no text"):
        draw(_corpus(tmp_path, tmp_path / "a.jsonl", only={"text": "zzz"}), pieces_of(), 10, 10)


def test_a_sample_is_of_the_asked_size_and_keeps_other_documents_out(tmp_path):
    texts = [f"number {i} " + "x" * 90 for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": t} for t in texts))
    corpus = _corpus(tmp_path, tmp_path / "a.jsonl")
    whole = draw(corpus, pieces_of(), 10**9, 10**9)
    assert whole.training_bytes + sum(map(len, whole.held_out)) == sum(map(len, texts))
    assert len(whole.held_out) == pytest.approx(len(texts) / HELD_OUT_SHARE, rel=0.5)
    some = draw(corpus, pieces_of(), 50_000, 1_000)
    assert some.training_bytes == pytest.approx(50_000, rel=0.2)
    assert 0 < len(some.held_out) < len(whole.held_out) and set(some.held_out) < set(whole.held_out)
    assert not any(re.sub(r"\D", "", text) in some.pieces for text in some.held_out)
    again = draw(corpus, pieces_of(), 50_000, 1_000)
    assert (again.pieces, again.held_out) == (some.pieces, some.held_out)

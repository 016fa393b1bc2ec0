"""Text files: one document each, or one a paragraph, by the rules of every other text."""

import json
import re

import pytest
from helpers.hostile import is_one_line
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data import line_index
from stellarbyte_jax.data.loader import make_loader
from stellarbyte_jax.data.shards import prepare
from stellarbyte_jax.data.sources import DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat, UnusableRecordError, read_text
from stellarbyte_jax.tokenizer.codec import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _open(tmp_path, *names, documents="file"):
    return open_corpus(
        [str(tmp_path / name) for name in names],
        setting="data.train",
        columns=("text",),
        fingerprint="f",
        text_documents=documents,
        cache_dir=tmp_path / "cache",
    )


def _texts(corpus, text=None):
    return [read_text(*corpus.locate(i), text or TextFormat()) for i in range(len(corpus))]


PARAGRAPHS = {
    "one": ["alone"],
    "several lines": ["first\n  second", "  indented {\n\tthird", "静夜思"],
    "blank lines around": ["", "", "a", "", "b", "", ""],
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("case", PARAGRAPHS)
def test_a_file_is_one_document_or_each_of_its_paragraphs(tmp_path, case, newline, mark):
    text = "\n\n".join(PARAGRAPHS[case]) + "\n"
    (tmp_path / "a.txt").write_bytes(mark + text.replace("\n", newline).encode())
    assert _texts(_open(tmp_path, "a.txt")) == [text]
    assert _texts(_open(tmp_path, "a.txt"), TextFormat(template="<{text}>")) == [f"<{text}>"]
    paragraphs = [p for p in re.split(r"\n(?:\s*\n)+", text.strip("\n")) if p.strip()]
    assert _texts(_open(tmp_path, "a.txt", documents="paragraph")) == paragraphs


def test_lines_of_white_space_are_blank_and_other_files_go_along(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n \t \n\n c\n\x0b\nd")
    (tmp_path / "b.jsonl").write_text('{"text": "x\\n\\ny"}\n')
    corpus = _open(tmp_path, "a.txt", "b.jsonl", documents="paragraph")
    assert _texts(corpus) == ["a\nb", " c", "d", "x\n\ny"]
    with pytest.raises(DataError, match=r"a\.txt:5: no field 'title'; the fields here are: text; .*such paragraphs"):
        read_text(*corpus.locate(1), TextFormat(("title",)))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(
    "blank", ["\u3000", "\u00a0", "\u3000 \t\u00a0", "\u2003", "\u0085", "\u2028", "\x1c", "\f"], ids=ascii
)
def test_a_line_that_strip_empties_parts_paragraphs_and_no_other_character_ends_a_line(tmp_path, blank, newline):
    """Such white space inside lines, and at their beginning, is text."""
    paragraphs = [f"\u3000\u3000甲{blank}乙\n\u3000丙", f"{blank}丁"]
    text = f"{blank}\n{paragraphs[0]}\n{blank}\n\n{paragraphs[1]}{blank}\n{blank}"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", newline).encode())
    corpus = _open(tmp_path, "a.txt", documents="paragraph")
    assert _texts(corpus) == paragraphs
    assert [corpus.sources[0].location(row) for row in (0, 1)] == [f"{tmp_path}/a.txt:{line}" for line in (2, 6)]
    assert _texts(_open(tmp_path, "a.txt")) == [text]


def test_a_byte_order_mark_is_one_at_the_beginning_alone(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa\n\ufeff\nb\n\n\ufeffc")
    assert _texts(_open(tmp_path, "a.txt", documents="paragraph")) == ["a\n\ufeff\nb", "\ufeffc"]


def test_a_byte_that_is_not_utf8_moves_no_paragraph(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xe9\xed\xa0\x80\n\nb\n\n\xff\n\nd")
    corpus = _open(tmp_path, "a.txt", documents="paragraph")
    assert [read_text(*corpus.locate(row), TextFormat()) for row in (1, 3)] == ["b", "d"]
    with pytest.raises(UnusableRecordError, match=r"a\.txt:5:1: not valid UTF-8"):
        read_text(*corpus.locate(2), TextFormat())


@pytest.mark.parametrize(
    ("documents", "bad", "unit"), [("file", 0, "file"), ("paragraph", 1, "paragraph")], ids=["file", "paragraph"]
)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_what_is_not_utf8_is_one_error_with_its_place_or_one_skip(tmp_path, tokenizer, documents, bad, unit, newline):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffine\n\nfine\nb\xe9d\n".replace(b"\n", newline))
    (tmp_path / "b.txt").write_text("good")
    corpus = _open(tmp_path, "*.txt", documents=documents)
    with pytest.raises(UnusableRecordError) as caught:
        read_text(*corpus.locate(bad), TextFormat())
    assert re.search(rf"a\.txt:4:2: not valid UTF-8 .*; mend the {unit} or leave such {unit}s out", str(caught.value))
    assert is_one_line(caught.value)
    data = DataConfig(
        train=(str(tmp_path / "*.txt"),),
        tokenizer=tokenizer,
        text_documents=documents,
        sequence_length=32,
        epochs=1,
        workers=0,
        shuffle=False,
        on_error="skip",
        cache_dir=str(tmp_path / "cache"),
    )
    with make_loader(data, split="train", batch_size=1, seed=0) as loader:
        (batch,) = loader
        assert loader.skipped == 1
    found = load_tokenizer(tokenizer).decode(batch["tokens"][batch["segment_ids"] > 0].tolist())
    assert found == {"file": "good", "paragraph": "finegood"}[documents]


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf\n", "\u3000\r\u00a0".encode()], ids=repr)
@pytest.mark.parametrize("documents", ["file", "paragraph"])
def test_a_file_without_text_is_named(tmp_path, content, documents):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt holds no text: it is empty, or its lines are blank"):
        _open(tmp_path, "a.txt", documents=documents)


def test_text_after_much_white_space_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(line_index, "_SCAN_CHARACTERS", 4)
    (tmp_path / "a.txt").write_text("\n \u3000" * 5 + "a\n")
    assert _texts(_open(tmp_path, "a.txt")) == ["\n \u3000" * 5 + "a\n"]


@pytest.mark.parametrize("documents", ["file", "paragraph"])
def test_a_file_that_becomes_shorter_is_one_error_that_names_it(tmp_path, documents):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    corpus = _open(tmp_path, "a.txt", documents=documents)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"a\.txt became shorter"):
        _texts(corpus)


def test_text_files_are_prepared_as_they_are_trained_on(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    made = {
        documents: prepare(
            [str(tmp_path / "a.txt")],
            tmp_path / documents,
            tokenizer,
            text=TextFormat(),
            text_documents=documents,
            workers=0,
            cache_dir=str(tmp_path / "cache"),
        )
        for documents in ("file", "paragraph")
    }
    assert [(m.documents, m.tokens) for m in made.values()] == [(1, 9), (2, 6)]
    assert json.loads((tmp_path / "paragraph" / "meta.json").read_text())["text_documents"] == "paragraph"


def test_a_place_among_files_is_none_among_paragraphs(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n')
    settings = {"tokenizer": tokenizer, "sequence_length": 8, "workers": 0, "cache_dir": str(tmp_path / "cache")}

    def loader(name, documents):
        data = DataConfig(train=(str(tmp_path / name),), text_documents=documents, **settings)
        return make_loader(data, split="train", batch_size=1, seed=0)

    for name, refused in (("a.txt", True), ("b.jsonl", False)):
        with loader(name, "file") as before, loader(name, "paragraph") as now:
            if refused:
                with pytest.raises(DataError, match="text_documents was 'file' and is now 'paragraph'"):
                    now.restore(before.state())
            else:
                now.restore(before.state())

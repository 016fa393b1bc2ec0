"""Paths and globs of settings: which files they name, and what is said of those that name none."""

import os

import pytest
from helpers.hostile import is_one_line

from stellarbyte_jax.data.patterns import expand
from stellarbyte_jax.data.sources import DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat, read_text

LINE = '{"text": "a river"}\n'
LONGEST = 255  # bytes of a file's name


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LINE)
    return path


@pytest.mark.parametrize("folder", ["[D_DATA]", "a[b", "what?", "[!x]", "星*星"])
def test_the_folders_of_a_glob_are_taken_as_they_stand(folder, here, monkeypatch):
    file = write(here / folder / "sub" / "a.jsonl")
    write(here / "D" / "sub" / "other.jsonl")
    relative = file.relative_to(here)
    for pattern, found in (
        (f"{folder}/sub/*.jsonl", relative),
        (f"{here}/{folder}/**/a.jsonl", file),
        (f"./{folder}/s?b/[ab].jsonl", relative),
        (f"{folder}/sub/a.jsonl", relative),
    ):
        assert expand(pattern, "data.train") == [found], pattern
    monkeypatch.setenv("HOME", str(here / folder))
    assert expand("~/s*/*.jsonl", "data.train") == [file]


def test_brackets_of_a_folder_that_is_not_there_choose_among_others(here):
    for name in "abc":
        write(here / f"set-{name}" / "a.jsonl")
    found = [str(path) for path in expand("set-[ac]/*.jsonl", "data.train")]
    assert found == ["set-a/a.jsonl", "set-c/a.jsonl"]


@pytest.mark.parametrize("name", ["x" * (LONGEST - 6), "长" * 83, "x" * 99 + "长" * 50])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_file_may_have_as_long_a_name_as_the_system_allows(name, suffix, here):
    file = here / f"{name}{suffix}"
    write(file)
    corpus = open_corpus(
        [str(file)],
        setting="data.train",
        columns=("text",),
        fingerprint="f",
        text_documents="paragraph",
        cache_dir=here / "cache",
    )
    assert read_text(*corpus.locate(0), TextFormat()) == ("a river" if suffix == ".jsonl" else LINE.strip())
    made = [each.name for each in (here / "cache").iterdir()]
    assert made and all(len(os.fsencode(each)) <= 143 and each[0] == name[0] for each in made)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "data.train: '' names no file: give a path or a glob, such as data.train=data/*.jsonl"),
        (" ", "data.train: ' ' names no file: give a path or a glob, such as data.train=data/*.jsonl"),
        ("hf://datasets/a/b.jsonl", "is an address, and files are read here alone: fetch it first"),
        ("s3://bucket/*.jsonl", "is an address, and files are read here alone: fetch it first"),
        ("x" * 300, "cannot be looked at: File name too long; mend that or name another path"),
        ("link*", "link.jsonl is a link to nothing: mend or remove it, or leave it out of 'link*'"),
        ("link.jsonl", "link.jsonl does not exist (looked from "),
    ],
)
def test_what_names_no_file_is_told_with_its_setting(pattern, message, here):
    (here / "link.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError) as failure:
        expand(pattern, "data.train")
    text = str(failure.value)
    assert text.startswith("data.train: ") and message in text and is_one_line(text)

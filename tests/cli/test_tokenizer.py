"""The command tokenizer: the same files each time, and one line for each mistake."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tokenizer_samples import CHINESE, ENGLISH, FIXED

from stellarbyte_jax.cli import tokenizer as script
from stellarbyte_jax.tokenizer.codec import load_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_tokenizer.py"


def test_script_trains_the_same_files_again(tmp_path):
    (tmp_path / "en.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{ENGLISH} {i}", "source": "good" if i % 2 else "bad"}) + "\n" for i in range(200)
        ),
        encoding="utf-8",
    )
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")
    files = []
    for run in ("a", "b"):
        command = [
            sys.executable, str(SCRIPT), "--output", str(tmp_path / run),
            "--cache-dir", str(tmp_path / "cache"),
            "--corpus", f"en={tmp_path}/*.jsonl", "--corpus", f"zh={tmp_path}/**/zh.txt",
            "--only", "en:source=absent", "--only", "en:source=goo.",
            "--stage", f"{FIXED + 10}:en", "--stage", f"{FIXED + 30}: en=1, zh=2",
        ]  # fmt: skip
        subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(ord(run))})
        files.append({f.name: f.read_bytes() for f in (tmp_path / run).iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "report.json"}
    report = json.loads(files[0]["report.json"])
    assert report["vocab_size"] == FIXED + 30 and report["tokenizer"]["en"]["round_trip"] == 1
    assert report["training_bytes"]["en"] < 110 * len(ENGLISH)
    assert load_tokenizer(tmp_path / "a").vocab_size == FIXED + 30


GOOD = "".join(json.dumps({"text": f"the cat and the dog {i}"}) + "\n" for i in range(100))


def _train(tmp_path, content, *more):
    path = tmp_path / "a[1].jsonl"
    path.write_text(content)
    places = ["--output", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
    return script.main(["--corpus", f"t={path}", "--stage", f"{FIXED + 5}:t", *places, *more])


def test_a_blank_line_at_the_end_is_no_document(tmp_path, capsys):
    assert _train(tmp_path, GOOD + "\n") == 0
    assert "round trip 100.00%" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "out").vocab_size == FIXED + 5


def test_bad_lines_are_skipped_and_counted_as_prepare_data_does(tmp_path, capsys):
    bad = '{"text": "x\\ud83d"}\n{"text": 3}\nnonsense\n'
    assert _train(tmp_path, bad + GOOD, "--on-error", "skip") == 0
    assert "distinct pieces, 3 lines skipped\n" in capsys.readouterr().out
    assert list((tmp_path / "cache").iterdir())
    first = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert _train(tmp_path, GOOD, "--overwrite") == 0
    assert "lines skipped" not in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == first


def test_without_text_that_is_held_out_there_are_no_figures_of_it(tmp_path, capsys):
    assert _train(tmp_path, GOOD, "--held-out-megabytes", "0") == 0
    shown = capsys.readouterr().out
    assert "bytes a token" not in shown and "round trip" not in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tokenizer"] == {} and report["held_out_bytes"] == {"t": 0}


def test_baselines_of_a_small_corpus_are_told_as_skipped(tmp_path, capsys):
    content = json.dumps({"text": ENGLISH + CHINESE}) + "\n"
    assert _train(tmp_path, GOOD + content, "--baselines") == 0
    printed = capsys.readouterr()
    told = re.findall(
        r"^baseline (\w+) skipped: the corpus has pairs for \d+ merges, \d+ are needed.*$", printed.out, re.M
    )
    assert told == ["gpt2_like_50257", "lossy_50000"] and printed.err == ""
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["skipped_baselines"]) == told
    assert list(report["baselines"]) == [f"gpt2_like_{FIXED + 5}", f"lossy_{FIXED + 5}"]


@pytest.mark.parametrize(
    ("line", "more", "message"),
    [
        ('{"text": "x\\ud83d"}\n', [], r"a\[1\]\.jsonl:101: half of a surrogate pair at character 2"),
        ('{"text": 3}\n', [], r"a\[1\]\.jsonl:101: field 'text' must be a string"),
        ("", ["--only", "t=x"], "--only t=x: write NAME:FIELD=REGEX"),
        ("", ["--only", "t:text=("], r"'\(', for field 'text', is no regular expression"),
        ("", ["--corpus", "u=absent.txt"], "corpus 'u': absent.txt does not exist"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, line, more, message):
    assert _train(tmp_path, GOOD + line, *more) == 1
    error = capsys.readouterr().err
    assert re.search("^error: .*" + message, error) and error.count("\n") == 1


BAD_STARTS = {
    "no file": ["--corpus", "u=absent.txt"],
    "bad record": ["--corpus", "u=bad.jsonl"],
    "bad gzip": ["--corpus", "u=bad.jsonl.gz"],
    "no text": ["--corpus", "u=empty.jsonl"],
    "filter": ["--only", "t:text=("],
    "all filtered out": ["--only", "t:text=zzz"],
    "stage": ["--stage", "x"],
    "stage without room": ["--stage", "10:t"],
    "too few pairs": ["--stage", "32000:t"],
    "unknown corpus": ["--stage", "400:x"],
}


@pytest.mark.parametrize("output", ["new/folder/out", "out"])
@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_that_fails_leaves_no_directory(tmp_path, monkeypatch, capsys, case, output):
    """Nor a cache that holds nothing; a directory that was there stays, and is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name, text in {"a[1].jsonl": "", "bad.jsonl": "{}\n", "bad.jsonl.gz": "no gzip", "empty.jsonl": ""}.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.iterdir())
    assert _train(tmp_path, GOOD, *BAD_STARTS[case], "--output", output, "--cache-dir", "new/kept") == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert sorted((tmp_path / "new").glob("*")) in ([], [tmp_path / "new" / "kept"])
    assert not (tmp_path / "new").exists() or any((tmp_path / "new" / "kept").iterdir())
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert sorted(tmp_path.iterdir()) == before and not any((tmp_path / "out").iterdir())


def test_what_was_trained_stays_where_its_figures_cannot_be_had(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no figures")

    monkeypatch.setattr(script, "evaluate", fail)
    assert _train(tmp_path, GOOD) == 1 and "error: no figures" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "out").vocab_size == FIXED + 5


def test_a_tokenizer_that_was_written_in_part_goes(tmp_path, monkeypatch, capsys):
    save = script.save

    def fail(*given):
        save(*given)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "save", fail)
    assert _train(tmp_path, GOOD) == 1 and "out cannot be written: No space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "place"), [(10_000, "out"), (30_000, r"out/report\.json")])
def test_a_write_that_fails_is_one_line_and_leaves_no_part(tmp_path, monkeypatch, capsys, size, place):
    """Of the tokenizer, whose largest file has 20 kB, or of a report that is larger."""
    report = {"tokenizer": {}, "skipped_baselines": {}, "more": "x" * 50_000}
    monkeypatch.setattr(script, "evaluate", lambda *_: report)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        assert _train(tmp_path, GOOD) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{place} cannot be written: File too large; a limit .*ulimit -f.*\n", errors), errors
    assert not list(tmp_path.rglob("*.partial")) and (tmp_path / "out").exists() == (size == 30_000)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--sample-megabytes", "nan"),
        ("--sample-megabytes", "inf"),
        ("--sample-megabytes", "-1"),
        ("--held-out-megabytes", "x"),
        ("--max-token-length", "0"),
        ("--model-max-length", "-3"),
    ],
)
def test_a_number_that_cannot_be_is_told_by_its_option(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        _train(tmp_path, GOOD, option, value)
    assert f"error: argument {option}: '{value}' must be a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_written_is_told_by_its_option(tmp_path, capsys):
    assert _train(tmp_path, GOOD, "--cache-dir", str(tmp_path / "a[1].jsonl" / "x")) == 1
    assert "choose another --cache-dir\n" in capsys.readouterr().err


def test_a_tokenizer_is_not_replaced_unless_asked(tmp_path, capsys):
    earlier = tmp_path / "out" / "tokenizer.json"
    earlier.parent.mkdir()
    earlier.write_text("mine")
    assert _train(tmp_path, GOOD) == 1
    assert "out holds a tokenizer already: give another --output, or --overwrite" in capsys.readouterr().err
    assert earlier.read_text() == "mine"
    assert _train(tmp_path, GOOD, "--overwrite") == 0 and earlier.read_text() != "mine"


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert _train(tmp_path, GOOD) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(r"error: .*out cannot be written: File exists; .*\n", printed.err)


def test_a_directory_that_takes_no_file_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    """As root, whom no permission stops, the system's answer is put in its place."""

    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(script.tempfile, "TemporaryFile", refuse)
    assert _train(tmp_path, GOOD) == 1
    told = f"error: {tmp_path / 'out'} cannot be written: Read-only file system; make it writable or choose another "
    assert capsys.readouterr() == ("", f"{told}--output\n") and not (tmp_path / "out").exists()


def test_filters_of_one_field_are_alternatives_and_of_several_conditions():
    filters = ["en:source=x", "en:source=y", "en:language=z"]
    corpora = script.parse_corpora(["en=a", "zh=b", "en=c"], filters, "body")
    assert corpora["en"].only == {"source": "x|y", "language": "z"} and corpora["zh"].only == {}
    assert corpora["en"].paths == ("a", "c") and corpora["en"].text_field == "body"


def test_options_reach_the_tokenizer(tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(
        script, "evaluate", lambda *given: evaluated.append(given[3]) or {"tokenizer": {}, "skipped_baselines": {}}
    )
    content = GOOD.replace('"text"', '"body"')
    more = ["--text-field", "body", "--model-max-length", "99", "--max-token-length", "2"]
    assert _train(tmp_path, content, *more) == 0
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 99
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(len(a) == len(b) == 1 for a, b in merges)
    assert _train(tmp_path, content, "--baselines", "--overwrite", *more) == 0
    assert evaluated[0] is None and callable(evaluated[1])

"""The command prepare: what it writes and says."""

import errno
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.cli import prepare as script
from stellarbyte_jax.cli import train
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.files import parsed, shipped
from stellarbyte_jax.data.encode import EncodeDocuments
from stellarbyte_jax.data.files import DataError
from stellarbyte_jax.data.patterns import expand_all
from stellarbyte_jax.tokenizer.codec import load_tokenizer

SHARD = ["offsets-00000.npy", "tokens-00000.npy"]
TEXTS = [f"[{i}] 春眠不覚暁 spring {'.' * (i % 9)}" for i in range(100)]


def test_the_script_prepares_and_reports(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": t, "title": "T"}) + "\n" for t in TEXTS), encoding="utf-8")
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), "--tokenizer", tokenizer, "--workers", "0"]
    arguments += ["--cache-dir", str(tmp_path / "cache"), "--template", "{title}: {text}"]
    assert script.main(arguments) == 0
    assert "100 documents," in capsys.readouterr().out
    assert script.main(arguments) == 1
    assert "is not empty" in capsys.readouterr().err
    first = np.load(tmp_path / "out" / "tokens-00000.npy")
    assert len(first) == sum(len(f"T: {t}".encode()) for t in TEXTS)


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs the command; returns its status, what it printed and its error."""
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    output, cache = str(tmp_path / "out"), str(tmp_path / "cache")

    def run(*arguments):
        status = script.main(
            ["--output", output, "--tokenizer", tokenizer, "--workers", "0", "--cache-dir", cache, *map(str, arguments)]
        )
        return status, *capsys.readouterr()

    return run


def test_text_files_and_what_comes_next(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    status, out, errors = prepare("--input", tmp_path / "a.txt", "--text-documents", "paragraphs")
    assert (status, errors) == (0, "")
    assert out.startswith("2 documents, 6 tokens, 1 shard\n")
    assert (
        f"--config quickstart --set data.train={tmp_path / 'out'} data.tokenizer={tmp_path / 'tokenizer'} "
        "model.vocab_size=288 output_dir=runs/out\n"
    ) in out


def test_a_run_on_shards_is_named_after_their_folder(prepare, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert " output_dir=runs/mine\n" in prepare("--input", "../a.txt", "--output", ".")[1]


@pytest.mark.parametrize("marked", [True, False], ids=["bos and eos", "neither"])
def test_what_comes_next_trains_as_it_is_typed(prepare, tmp_path, monkeypatch, marked):
    """With a tokenizer that is not the config's, and may have no tokens for the ends of a text; in fewer steps."""
    monkeypatch.chdir(tmp_path)
    if not marked:
        settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
        kept = {name: value for name, value in settings.items() if name not in ("bos_token", "eos_token")}
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(kept))
        (tmp_path / "tokenizer" / "special_tokens_map.json").unlink()
    (tmp_path / "a b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    status, out, _ = prepare("--input", "a b.jsonl", "--output", "my shards")
    line = next(line for line in out.splitlines() if line.startswith("  train:"))
    words = shlex.split(line.partition(":")[2])
    assert (status, words[:2]) == (0, ["stellarbyte", "train"])
    small = ["steps=1", "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16"]
    fast = ["schedule.warmup_steps=0", "evaluation.batches=1", "sample_prompts=none", "export_at_end=false"]
    fast += ["data.sequence_length=16", "global_batch_size=2", "data.cache_dir=cache"]
    with jax.numpy_dtype_promotion("standard"):
        assert train.main([*words[2:], *small, *fast]) == 0
    made = TrainConfig.from_dict(json.loads((tmp_path / "runs" / "my shards" / "train_config.json").read_text()))
    assert (made.data.train, made.model.vocab_size) == (("my shards",), 288)
    assert made.data.add_bos == made.data.add_eos == marked


@pytest.mark.parametrize("output", ["a,b", "[D] x", "none", "春 天", "a=b", "~x", "-x"])
def test_what_comes_next_names_the_output_whatever_it_is_called(prepare, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a river"}\n')
    given = f"./{output}" if output.startswith("~") else output
    status, out, errors = prepare("--input", "a.jsonl", f"--output={given}")
    assert (status, errors) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith("  train:"))
    words = shlex.split(line.partition(":")[2])
    settings = parsed(TrainConfig, words[words.index("--set") + 1 :])
    assert [path.resolve() for path in expand_all(settings["data.train"], "data.train")] == [tmp_path / output]


def test_bad_lines_are_told_with_options_of_this_command(prepare, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    assert prepare("--input", path) == (
        1,
        "",
        f"error: {path}:2: no field 'text'; the fields here are: txt; name one of these; mend the line or leave such "
        "lines out with --on-error skip\n",
    )
    status, out, errors = prepare("--input", path, "--on-error", "skip")
    assert (status, errors) == (0, "") and "1 document, 1 token, 1 shard, 1 unusable one skipped\n" in out
    status, out, errors = prepare("--input", path, "--on-error", "skip")
    assert (status, out) == (1, "") and errors.endswith("choose another --output, or add --overwrite\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jsonl"], r"error: --input: absent\.jsonl does not exist .*"),
        (["--input", "a.jsonl", "--template", "{"], r"error: --template '\{': .*"),
        (["--input", "a.jsonl", "--shard-tokens", "0"], r"error: --shard-tokens must be positive, got 0"),
        (["--input", "a.jsonl", "--workers", "-1"], r"error: --workers must not be negative, got -1"),
        (["--input", "a.jsonl", "--cache-dir", "a.jsonl"], r"error: .*another --cache-dir"),
        (["--input", "a.jsonl", "--output", "a.jsonl/x"], r"error: cannot write to the output a\.jsonl/x: Not a dir.*"),
        (["--input", "sets"], r"error: --input: sets holds the splits train: name one, such as sets/train"),
    ],
    ids=str,
)
def test_settings_are_told_by_their_options(prepare, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "sets" / "train").mkdir(parents=True)
    (tmp_path / "sets" / "dataset_dict.json").write_text("{}")
    (tmp_path / "sets" / "train" / "state.json").write_text("{}")
    status, out, errors = prepare(*arguments)
    assert (status, out, errors.count("\n")) == (1, "", 1)
    assert re.fullmatch(message + "\n", errors), errors
    assert "data." not in errors


def test_an_output_that_cannot_be_written_is_one_line_before_the_work(prepare, tmp_path, monkeypatch):
    """As root, whom no permission stops, the system's answer is put in its place."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(EncodeDocuments, "__call__", lambda *_: pytest.fail("begun"))
    assert prepare("--input", tmp_path / "a.jsonl") == (
        1,
        "",
        f"error: cannot write to the output {tmp_path / 'out'}: Read-only file system; make it writable or choose "
        "another --output\n",
    )


def test_on_a_terminal_the_bar_comes_with_the_work_and_goes_with_it(prepare, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    path = tmp_path / "a.jsonl"
    path.write_text('{"txt": "a"}\n')
    status, out, errors = prepare("--input", path)
    assert (status, out) == (1, "") and "no field 'text'" in errors
    path.write_text('{"text": "a"}\n')
    status, out, _ = prepare("--input", path, "--overwrite")
    bar, _, rest = out.partition("1 document, ")
    assert status == 0 and "1 tokens" in bar and bar.endswith("\x1b[2K") and "\x1b" not in rest


@pytest.mark.parametrize(("begun", "there"), [(False, False), (True, False), (True, True)])
def test_an_interruption_leaves_nothing(prepare, tmp_path, monkeypatch, begun, there):
    if there:
        (tmp_path / "out").mkdir()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    calls = iter([begun])
    encode = EncodeDocuments.__call__

    def interrupted(self, numbers):
        if not next(calls, False):
            raise KeyboardInterrupt
        return encode(self, numbers)

    monkeypatch.setattr(EncodeDocuments, "__call__", interrupted)
    status, _, errors = prepare("--input", tmp_path / "a.jsonl", "--shard-tokens", "1")
    assert (status, errors) == (130, "\ninterrupted\n")
    assert (tmp_path / "out").exists() == there and not any((tmp_path / "out").glob("*"))


BAD_STARTS = {
    "no file": ["--input", "absent.jsonl"],
    "bad record": ["--input", "bad.jsonl"],
    "bad record after shards": ["--input", "late.jsonl", "--shard-tokens", "1"],
    "bad gzip": ["--input", "bad.jsonl.gz"],
    "bad parquet": ["--input", "bad.parquet"],
    "unknown kind": ["--input", "a.csv"],
    "no text": ["--input", "empty.jsonl"],
    "no tokens": ["--input", "blank.jsonl"],
    "template": ["--input", "a.jsonl", "--template", "{"],
    "shard tokens": ["--input", "a.jsonl", "--shard-tokens", "0"],
    "workers": ["--input", "a.jsonl", "--workers", "-1"],
    "tokenizer": ["--input", "a.jsonl", "--tokenizer", "absent"],
}


@pytest.mark.parametrize("output", ["new/folder/out", "out"])
@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_that_fails_leaves_no_directory(prepare, tmp_path, monkeypatch, case, output):
    """Nor a cache that holds nothing; a directory that was there stays, and is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name, text in {
        "bad.jsonl": "{}\n",
        "late.jsonl": '{"text": "a"}\n' * 100 + "{}\n",
        "bad.jsonl.gz": "no gzip",
        "bad.parquet": "no parquet",
        "a.csv": "a",
        "empty.jsonl": "",
        "blank.jsonl": '{"text": ""}\n',
        "a.jsonl": '{"text": "a"}\n',
    }.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.iterdir())
    status, _, errors = prepare(*BAD_STARTS[case], "--output", output, "--cache-dir", "new/kept")
    assert status == 1 and errors.startswith("error: ") and errors.count("\n") == 1
    assert sorted((tmp_path / "new").glob("*")) in ([], [tmp_path / "new" / "kept"])
    assert not (tmp_path / "new").exists() or any((tmp_path / "new" / "kept").iterdir())
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert sorted(tmp_path.iterdir()) == before and not any((tmp_path / "out").iterdir())


def test_what_is_overwritten_stays_until_there_is_something_in_its_place(prepare, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 100)
    assert prepare("--input", path, "--shard-tokens", "1")[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert len(before) > 3
    path.write_text("{}\n")
    assert prepare("--input", path, "--overwrite")[0] == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    path.write_text('{"text": "b"}\n')
    assert prepare("--input", path, "--overwrite")[0] == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["meta.json", *SHARD]


def test_the_tokenizer_that_comes_with_the_package_is_the_default(tmp_path, monkeypatch, capsys):
    """From any folder."""
    (tmp_path / "a.txt").write_text("春眠不覚暁")
    monkeypatch.chdir(tmp_path)
    assert script.main(["--input", "a.txt", "--output", "out", "--workers", "0", "--cache-dir", "cache"]) == 0
    vocabulary = load_tokenizer(shipped("tokenizer"))
    assert np.load(tmp_path / "out" / "tokens-00000.npy").tolist() == vocabulary.encode("春眠不覚暁")


def test_nothing_is_said_of_checkpoints(prepare, tmp_path, monkeypatch):
    def work(*places, **settings):
        raise DataError("inputs: a.jsonl became shorter. Put it back and start again; the checkpoints are kept")

    monkeypatch.setattr(script, "prepare", work)
    told = "error: --input: a.jsonl became shorter. Put it back and start again\n"
    assert prepare("--input", "a.jsonl") == (1, "", told)


def test_every_option_reaches_the_work(prepare, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert prepare("--input", tmp_path / "a.jsonl")[0] == 0
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    status, out, _ = prepare("--input", tmp_path / "a.jsonl", "--overwrite")
    assert status == 0 and out.startswith("1 document, 3 tokens, ")
    given = {}

    def work(*places, **settings):
        given.update(settings, places=places)
        raise ValueError("enough")

    monkeypatch.setattr(script, "prepare", work)
    options = ["--workers", "3", "--shard-tokens", "7", "--on-error", "skip", "--cache-dir", "c", "--fields", "x", "y"]
    assert prepare("--input", "a", "b", *options)[0] == 1
    assert given["places"][0] == ["a", "b"] and given["text"].fields == ("x", "y") and not given["overwrite"]
    assert (given["workers"], given["shard_tokens"], given["on_error"], given["cache_dir"]) == (3, 7, "skip", "c")

"""Prepared shards: the same batches as from the text, and no directory that is half done or of another tokenizer."""

import contextlib
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.hostile import accepts, is_one_line
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data.loader import make_loader
from stellarbyte_jax.data.shards import prepare
from stellarbyte_jax.data.sources import DataError, open_corpus
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.training import format as tokenizer_format

TEXTS = [f"[{i}] 春眠不覚暁 spring {'.' * (i % 9)}" for i in range(100)]


@pytest.fixture
def tokenizer(tmp_path):
    return save_byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t, "title": "T"}) + "\n" for t in TEXTS), encoding="utf-8")
    return str(path)


def _prepare(tmp_path, source, tokenizer, **more):
    options = {"text": TextFormat(), "workers": 0, "cache_dir": str(tmp_path / "cache"), **more}
    return prepare([source], tmp_path / "out", tokenizer, **options)


def _batches(tmp_path, path, tokenizer):
    config = DataConfig(
        train=(str(path),), tokenizer=tokenizer, sequence_length=32, epochs=2, workers=0, cache_dir=str(tmp_path / "c")
    )
    with make_loader(config, split="train", batch_size=4, seed=0) as loader:
        return list(loader)


@pytest.mark.parametrize("shard_tokens", [500, 10**9])
def test_shards_give_the_batches_of_the_text(tmp_path, source, tokenizer, shard_tokens):
    prepared = _prepare(tmp_path, source, tokenizer, shard_tokens=shard_tokens)
    assert (len(prepared.shards) > 1) == (shard_tokens == 500)
    assert prepared.dtype == "uint16"
    assert prepared.documents == 100
    expected = _batches(tmp_path, source, tokenizer)
    got = _batches(tmp_path, tmp_path / "out", tokenizer)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        for key in b:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_the_content_of_a_shard_is_that_of_both_of_its_files(tmp_path, source, tokenizer):
    _prepare(tmp_path, source, tokenizer)

    def contents():
        options = {"setting": "data.train", "columns": ["text"], "fingerprint": load_tokenizer(tokenizer).fingerprint}
        return dict(open_corpus([str(tmp_path / "out")], **options).contents)

    before = contents()
    assert len(before) == 2
    for path in before:
        content = bytearray(Path(path).read_bytes())
        content[content.index(b"}") + 1] = ord("\t")  # in the padding of the header: both are read as before
        Path(path).write_bytes(content)
        assert [name for name, found in contents().items() if found != before[name]] == [path]
        before = contents()


def test_a_large_vocabulary_takes_wider_tokens(tmp_path, source, tokenizer):
    file = Path(tokenizer, "tokenizer.json")
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["added_tokens"].append({**settings["added_tokens"][-1], "id": 70_000, "content": "<|far|>"})
    settings["model"]["vocab"]["<|far|>"] = 70_000
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert _prepare(tmp_path, source, tokenizer).dtype == "uint32"
    assert len(_batches(tmp_path, tmp_path / "out", tokenizer)) == len(_batches(tmp_path, source, tokenizer))


def test_workers_write_the_same_files(tmp_path, source, tokenizer):
    _prepare(tmp_path, source, tokenizer)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    _prepare(tmp_path, source, tokenizer, workers=2, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_killed_run_is_refused_until_it_is_done_again(tmp_path, source, tokenizer):
    _prepare(tmp_path, source, tokenizer, shard_tokens=100)
    (tmp_path / "out" / "meta.json").unlink()  # which comes last
    assert len(list((tmp_path / "out").glob("tokens-*.npy"))) > 1
    with pytest.raises(DataError, match=r"out has no meta\.json: .* interrupted"):
        _batches(tmp_path, tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match="is not empty; choose another output directory, or ask to overwrite it"):
        _prepare(tmp_path, source, tokenizer)
    _prepare(tmp_path, source, tokenizer, overwrite=True)
    assert len(list((tmp_path / "out").glob("tokens-*.npy"))) == 1
    assert _batches(tmp_path, tmp_path / "out", tokenizer)


def test_overwrite_touches_nothing_foreign(tmp_path, source, tokenizer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"holds other files \(thesis\.tex\)"):
        _prepare(tmp_path, source, tokenizer, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize("there", [False, True])
def test_what_comes_into_the_output_during_the_work_stays(tmp_path, source, tokenizer, there):
    """Where shards are written, and where a run fails that has written some into a directory that was there."""
    out = tmp_path / "out"
    _prepare(tmp_path, source, tokenizer, shard_tokens=100)

    def work(read, tokens, total):
        (out / "thesis.tex").write_text("precious")
        if there and read == total:
            raise RuntimeError

    with pytest.raises(RuntimeError) if there else contextlib.nullcontext():
        _prepare(tmp_path, source, tokenizer, overwrite=True, progress=work, shard_tokens=100 if there else 10**9)
    assert (out / "thesis.tex").exists() and (out / "meta.json").exists() == (not there)
    assert len(list(out.glob("tokens-*.npy"))) == (not there)


def test_a_disk_that_is_full_at_the_end_is_told(tmp_path, source, tokenizer, monkeypatch):
    replace = os.replace

    def full(path, target):
        if target.name == "meta.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(path, target)

    monkeypatch.setattr(os, "replace", full)
    told = f"^cannot write to the output {tmp_path / 'out'}: No space left on device; "
    with pytest.raises(DataError, match=told):
        _prepare(tmp_path, source, tokenizer)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(tmp_path, source, tokenizer):
    _prepare(tmp_path, source, tokenizer)
    other = tmp_path / "other"
    tokenizer_format.save(tokenizer_format.build([("a", "b")]), other, 1024)
    made_with, used = (load_tokenizer(path).fingerprint for path in (tokenizer, other))
    shown = (
        rf"was prepared with another tokenizer \(fingerprint {made_with[:12]}, data\.tokenizer has {used[:12]}\); set"
    )
    with pytest.raises(DataError, match=shown):
        _batches(tmp_path, tmp_path / "out", str(other))


@pytest.mark.parametrize("how", ["cut meta", "missing shard", "cut shard", "other format"])
def test_damage_is_named(tmp_path, source, tokenizer, how):
    _prepare(tmp_path, source, tokenizer)
    out = tmp_path / "out"
    meta = json.loads((out / "meta.json").read_text())
    if how == "cut meta":
        (out / "meta.json").write_text("{")
    elif how == "missing shard":
        (out / "offsets-00000.npy").unlink()
    elif how == "cut shard":
        (out / "tokens-00000.npy").write_bytes((out / "tokens-00000.npy").read_bytes()[:-10])
    else:
        (out / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(DataError, match=r"prepare(_data\.py| the data) again"):
        _batches(tmp_path, out, tokenizer)


LONG = "x\n\x1b[2J" * 10**5


@pytest.mark.parametrize(
    "changes",
    [
        {"format": LONG},
        {"tokenizer_fingerprint": LONG},
        {"tokenizer_fingerprint": {LONG: 1}},
        {"shards": []},
        {"shards": [{"token_file": "tokens-00000.npy", "offset_file": "offsets-00000.npy"}]},
        {"shards": [{"token_file": LONG, "offset_file": LONG, "documents": 1, "tokens": 1}]},
        {"shards": [{"token_file": "a", "offset_file": "a", "documents": 2**70, "tokens": LONG}]},
        {LONG: LONG},
        b"[" * 10**5,
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": 1, "format": 2}',
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_hostile_meta_is_one_short_line(tmp_path, source, tokenizer, changes):
    _prepare(tmp_path, source, tokenizer)
    meta = tmp_path / "out" / "meta.json"
    if isinstance(changes, dict):
        changes = json.dumps({**json.loads(meta.read_text()), **changes}).encode()
    meta.write_bytes(changes)
    accepts(lambda: _batches(tmp_path, tmp_path / "out", tokenizer))


@pytest.mark.parametrize("kind", ["token_file", "offset_file"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_shard_outside_of_the_directory_is_not_read(tmp_path, source, tokenizer, kind, absolute):
    _prepare(tmp_path, source, tokenizer)
    path = tmp_path / "out" / "meta.json"
    meta = json.loads(path.read_text())
    name = meta["shards"][0][kind]
    (tmp_path / "out" / name).rename(tmp_path / name)
    meta["shards"][0][kind] = str(tmp_path / name) if absolute else f"../{name}"
    path.write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"shards must be files of this directory"):
        _batches(tmp_path, tmp_path / "out", tokenizer)


def test_foreign_names_in_the_output_stay_one_line(tmp_path, source, tokenizer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a\n\x1b[2J").touch()
    with pytest.raises(DataError, match="holds other files") as caught:
        _prepare(tmp_path, source, tokenizer, overwrite=True)
    assert is_one_line(caught.value)


def test_bad_lines_are_an_error_or_counted(tmp_path, source, tokenizer):
    with open(source, "a") as file:
        file.write("{bad\n")
    with pytest.raises(DataError, match=r"a\.jsonl:101:2: not valid JSON"):
        _prepare(tmp_path, source, tokenizer)
    prepared = _prepare(tmp_path, source, tokenizer, on_error="skip", overwrite=True)
    assert (prepared.documents, prepared.skipped) == (100, 1)


def test_input_without_text_is_an_error(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document of the inputs holds any text"):
        _prepare(tmp_path, str(path), tokenizer)

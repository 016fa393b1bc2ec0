"""The command prepare: what it writes and says."""

import json

import numpy as np
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.cli import prepare as script

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

"""scripts/prepare_data.py: what it writes and says."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
TEXTS = [f"[{i}] 春眠不覚暁 spring {'.' * (i % 9)}" for i in range(100)]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("prepare_data_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_prepares_and_reports(script, tmp_path, capsys):
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

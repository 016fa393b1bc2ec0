"""What commands share: messages of libraries in words of their options, and types of arguments."""

import argparse

import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import settings

from stellarbyte_jax.cli.program import also_spelled, load_settings, positive, told_by_options, with_options
from stellarbyte_jax.config import ConfigError, DataConfig

NAMES = ("cache_dir", "top_k", "workers")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("choose another cache_dir", "choose another --cache-dir"),
        ("top_k=3 has no effect", "--top-k 3 has no effect"),
        ("give top_k=3, or lower data.workers.", "give --top-k 3, or lower --workers."),
        ("(data.workers=0; cache_dir)", "(--workers 0; --cache-dir)"),
        ("the workers of data.train", "the workers of data.train"),
        ("/home/cache_dir/x, cache_dir/x, cache_dir.txt", "/home/cache_dir/x, cache_dir/x, cache_dir.txt"),
        ("model.top_k, top_k_more and my-top_k", "model.top_k, top_k_more and my-top_k"),
        ("it is not empty; ask to overwrite it", "it is not empty; add --overwrite"),
    ],
)
def test_arguments_and_settings_are_told_as_options(message, told):
    assert with_options(message, NAMES) == told


def test_without_names_no_setting_is_replaced():
    assert with_options("data.train, or ask to overwrite it", ()) == "data.train, or add --overwrite"


def test_errors_of_settings_stay_as_they_are():
    with pytest.raises(ValueError, match=r"^--top-k is wrong$"), told_by_options(NAMES):
        raise ValueError("top_k is wrong")
    for error in (ConfigError("top_k is wrong"), OSError("top_k is wrong")):
        with pytest.raises(type(error), match=r"^top_k is wrong$"), told_by_options(NAMES):
            raise error


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", ""])
def test_a_number_that_is_not_positive_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer of at least 1"):
        positive(text)
    assert positive("12") == 12


def test_a_choice_may_be_spelled_in_other_ways(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", type=also_spelled({"markdown": "md"}), choices=("md", "html"))
    for text, meant in (("md", "md"), ("Markdown", "md"), ("HTML", "html")):
        assert parser.parse_args(["--format", text]).format == meant
    with pytest.raises(SystemExit):
        parser.parse_args(["--format", "pdf"])
    assert "invalid choice: 'pdf'" in capsys.readouterr().err


def test_the_copy_of_a_tokenizer_is_for_what_a_run_recorded(tmp_path, monkeypatch, capsys):
    """A Python file beside a tokenizer means the one that it names."""
    monkeypatch.setenv("HOME", str(tmp_path))
    copy = save_byte_tokenizer(tmp_path / "tokenizer")
    recorded = settings(data=DataConfig(sequence_length=16, tokenizer="gone"))
    (tmp_path / "train_config.json").write_text(recorded.to_json())
    assert load_settings("~/train_config.json", []).data.tokenizer == copy
    assert f"its copy in {copy} is used\n" in capsys.readouterr().out
    there = save_byte_tokenizer(tmp_path / "there")
    (tmp_path / "train_config.json").write_text(recorded.to_json().replace('"gone"', f'"{there}"'))
    assert load_settings("~/train_config.json", []).data.tokenizer == there
    assert capsys.readouterr().out == ""
    text = (
        "from stellarbyte_jax.config import *\ndef config():\n    return TrainConfig(output_dir='a', steps=300, {})\n"
    )
    (tmp_path / "mine.py").write_text(text.format("data=DataConfig(tokenizer='gone')"))
    assert load_settings(str(tmp_path / "mine.py"), []).data.tokenizer == "gone"
    assert capsys.readouterr().out == ""

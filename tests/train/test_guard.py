"""Is every mistake one clear line?"""

import sys

import pytest
from helpers.runs import cli, data_setting, one_error

MISTAKES = {
    "missing data file": (lambda t: ["data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
    "empty data file": (lambda t: [data_setting(t, "")], ["bad.jsonl"]),
    "bad JSON": (lambda t: [data_setting(t, '{"text": "a"}\n{"text": oh}\n')], ["bad.jsonl:2"]),
    "missing field": (lambda t: [data_setting(t, '{"body": "a"}\n')], ["bad.jsonl:1", "'text'", "body"]),
    "tokenizer bigger than the vocabulary": (lambda t: ["model.vocab_size=1000"], ["1000", "32000"]),
    "no tokenizer": (lambda t: ["data.tokenizer=nowhere"], ["nowhere"]),
    "not exportable": (
        lambda t: ["export_at_end=true", "model.position_embedding=xpos"],
        ["position_embedding"],
    ),
    "loss that diverges": (
        lambda t: ["optimizer.learning_rate=1e30", "optimizer.gradient_clip_norm=none", "schedule.warmup_steps=0"],
        ["the gradient norm is nan at step", "learning_rate"],
    ),
    "unwritable output": (lambda t: ["output_dir=/dev/null/run"], ["/dev/null/run"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, config_file, tmp_path, capsys):
    make, parts = MISTAKES[mistake]
    assert cli(config_file, *make(tmp_path)) == 1
    assert one_error(capsys, *parts)


def test_a_mistyped_command_line(config_file, tmp_path, capsys):
    for settings, parts in {
        ("model.hiden_size=3",): ["model.hiden_size", "did you mean model.hidden_size"],
        ("model.num_attention_heads=3",): ["16", "3", "not divisible"],
        ("steps=many",): ["steps", "many"],
    }.items():
        assert cli(config_file, *settings) == 2
        assert one_error(capsys, *parts)
    assert cli(tmp_path / "tinny.py") == 2
    assert one_error(capsys, "tinny.py", "did you mean", "tiny.py")


def test_a_tracker_that_is_not_installed(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli(config_file, "logging.trackers=wandb") == 1
    assert one_error(capsys, "'wandb'", "pip install -e '.[trackers]'")

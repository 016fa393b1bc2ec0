"""Is what is told of the settings complete, true and up to date?"""

import dataclasses
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.training import settings as small_settings

from stellarbyte_jax.cli.train import main
from stellarbyte_jax.config import ByteConfig, RopeScaling, TrainConfig, override
from stellarbyte_jax.config.reference import (
    REQUIRED,
    changed,
    listed,
    markdown,
    matching,
    meanings,
    settings,
    written,
)
from stellarbyte_jax.config.section import hints, is_section

ROOT = Path(__file__).parents[2]
BASE = TrainConfig(output_dir="x", steps=100)


def sections(section=TrainConfig):
    return [section, *(s for hint in hints(section).values() if is_section(hint) for s in sections(hint))]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_each_setting_has_a_meaning_in_its_place(section):
    told = meanings(section)
    assert list(told) == list(hints(section))
    assert all(meaning and not meaning.endswith(".") for meaning in told.values())


def test_the_names_are_those_of_overrides_and_the_defaults_are_read_back():
    """As printed, so that a line can be copied."""
    for each in settings():
        if each.default is not REQUIRED:
            assert override(BASE, [f"{each.name}={written(each.default)}"]) == BASE, each.name
    assert [s.name for s in settings() if s.default is REQUIRED] == ["output_dir", "steps"]
    flat = {name for name, _ in flattened(BASE.to_dict())}
    assert {s.name for s in settings()} == flat


def flattened(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (1, "1"),
        (0, "0"),
        (("a,b", "春"), '["a,b", "春"]'),
        ((1, 2), "[1, 2]"),
        ("b", "b"),
    ],
)
def test_values_are_written_as_they_are_read(value, text):
    assert written(value) == text


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == markdown(), (
        "run: python -m stellarbyte_jax.config.reference > docs/settings.md"
    )


def test_a_row_of_the_page_is_not_broken_by_its_content():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(list(settings()))
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("hidden_size", ["model.hidden_size", "model.head_dim", "model.intermediate_size"]),
        ("schedule.c*", ["schedule.cycles", "schedule.cycle_decay"]),
        ("SwiGLU", ["model.hidden_act"]),
        ("LR", ["optimizer.learning_rate", "optimizer.router_learning_rate_ratio"]),
        ("nothing like it", []),
    ],
)
def test_settings_are_found_by_name_pattern_and_meaning(pattern, expected):
    assert [each.name for each in matching(pattern)] == expected


def test_what_differs_from_the_defaults():
    config = small_settings(seed=3, model=ByteConfig(rope_scaling=RopeScaling(name="linear", factor=2.0)))
    found = changed(config)
    defaults = dict(flattened(BASE.to_dict()))
    expected = {n: v for n, v in flattened(config.to_dict()) if v != defaults[n]}
    expected |= {"output_dir": "unused", "steps": 50}
    assert {name: value for name, (value, _) in found.items()} == expected
    assert found["model.rope_scaling.factor"] == (2.0, 1.0) and found["output_dir"] == ("unused", dataclasses.MISSING)


@pytest.mark.parametrize(("more", "count"), [([], len(list(settings()))), (["cycle"], 2)])
def test_the_list_is_printed_without_a_config(more, count, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--list-settings", *more])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed == listed(matching(*more or [""])) + "\n"
    assert len(printed.splitlines()) == 3 * count


def test_a_pattern_that_fits_nothing_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--list-settings", "xyz"])
    assert end.value.code == 2 and "no setting matches 'xyz'" in capsys.readouterr().err


def test_help_has_meanings_and_no_addresses():
    text = pydoc.render_doc(ByteConfig, renderer=pydoc.plaintext)
    assert "hidden_size: channels of the residual stream" in text
    assert " at 0x" not in text.partition("Methods defined here")[0] and "<lambda>" not in text


def test_a_misspelt_setting_is_a_short_line(capsys):
    assert main(["--config", "quickstart", "--set", "model.hiden_size=3"]) == 2
    line = capsys.readouterr().err
    assert "did you mean model.hidden_size" in line and "--list-settings" in line and len(line) < 250
    assert "--list-settings" in line and sys.getsizeof(line) < 400


def test_usual_names_of_other_programs_are_guessed():
    from stellarbyte_jax.config.section import USUAL, unknown_name

    names = {each.name: None for each in settings()}
    for usual, ours in USUAL.items():
        message = unknown_name(f"optimizer.{usual}", names, "x")
        expected = [name for name in names if name.rpartition(".")[2] == ours]
        assert expected and all(name in message.partition("did you mean ")[2] for name in expected), usual


def test_without_docstrings_there_are_names_and_defaults():
    """``python -OO`` drops them."""
    code = "from stellarbyte_jax.config.reference import listed, matching; print(listed(matching('weight_decay')))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("optimizer.weight_decay = 0.1\n")

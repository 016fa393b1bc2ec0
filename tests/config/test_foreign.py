"""What a message says of values that files of others hold: one short line."""

import json

import pytest
from helpers.hostile import is_one_line

from stellarbyte_jax.config.foreign import clipped, digits, json_object, listed, shown


def test_values_are_shown_as_they_are_spelled() -> None:
    assert [shown(value) for value in ("a", ["a", 1], None)] == ["'a'", "['a', 1]", "None"]
    assert clipped("a 词") == "a 词"
    assert listed("abcde") == "a, b, c, d, e" and listed("abcdefg") == "a, b, c, d, e and 2 more"


def test_a_fingerprint_is_told_by_its_first_digits() -> None:
    assert [digits(value) for value in ("0123456789abcdef" * 4, "ab", None, 10**5000)] == [
        "0123456789ab",
        "ab",
        "None",
        "a value of type int that is too large to show",
    ]


def test_the_middle_of_what_is_long_is_cut_out() -> None:
    long = shown("b" + "x" * 10**6 + "e")
    assert len(long) < 220 and long.startswith("'bx") and " ... " in long and long.endswith("xe'")
    assert len(listed(["x" * 10**6] * 10**3)) < 700
    assert len(clipped("\x1b" * 10**6)) < 220


def test_control_characters_are_escaped() -> None:
    assert clipped("a\n\x1b[2J\u2028\ud800") == "a\\n\\x1b[2J\\u2028\\ud800"
    assert listed(["a\r"]) == "a\\r" and shown("\n") == "'\\n'"


def test_what_python_cannot_spell_is_named() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(10**5000) == "a value of type int that is too large to show"
    assert shown(deep) == "a value of type list that is too large to show"
    while deep:  # or the garbage collector goes down as far
        deep = deep[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, r"^x\.json is not valid JSON: it is nested too deeply\. Copy the file again$"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"^x\.json is not valid JSON: Exceeds the limit .*\. Copy the file again$"),
        (b"[1]", r"^x\.json must hold a JSON object, got list$"),
        (b'{"a": 1, "a": 2}', r"^x\.json gives two values for the key 'a', 1 and 2: keep one of them$"),
        (b'{"a": 1, "a": true}', r"^x\.json gives two values for the key 'a', 1 and True: keep one of them$"),
        (b'{"a": {"b": [{"c\\n": null, "c\\n": "d"}]}}', r"the key 'c\\n', None and 'd': keep one of them$"),
    ],
)
def test_json_that_python_does_not_read(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_object(content, "x.json")


def test_a_key_may_be_repeated_with_the_same_value() -> None:
    assert json_object(b'{"a": [1, {"b": NaN}], "c": 3, "a": [1, {"b": NaN}]}', "x.json")["c"] == 3


@pytest.mark.parametrize("key", ["x" * 10**6, "\n\x1b[2J" * 10**5])
def test_a_repeated_key_is_one_short_line(key: str) -> None:
    content = f"{{{json.dumps(key)}: 1, {json.dumps(key)}: {json.dumps(key)}}}".encode()
    with pytest.raises(ValueError, match="gives two values for the key '") as caught:
        json_object(content, "x.json")
    assert is_one_line(caught.value)

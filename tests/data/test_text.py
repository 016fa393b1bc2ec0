"""Records to text: fields or a template, and what is wrong is named with its field and its place."""

import pytest
from helpers.hostile import is_one_line
from helpers.record_files import BAD_LINES, lines_of, write_records

from stellarbyte_jax.data.sources import BadRecordError, DataError, open_lines
from stellarbyte_jax.data.text import TextFormat, read_text


def test_fields_are_joined_by_a_line_end_in_the_order_of_the_settings():
    assert TextFormat().render({"more": 3, "text": "a\n春"}) == "a\n春"
    text = TextFormat(("b", "a"))
    assert text.columns == ("b", "a")
    assert text.render({"a": "x", "b": "y"}) == "y\nx"
    assert text.values({"a": "x", "more": None, "b": ""}) == {"b": "", "a": "x"}
    assert list(text.values({"a": "x", "b": "y"})) == ["b", "a"]


def test_template_fills_in_fields():
    text = TextFormat(template="Question: {q}\nAnswer: {a} {{{q}}}")
    assert text.columns == ("q", "a")
    assert text.render({"q": "1+1?", "a": "2", "more": 3}) == "Question: 1+1?\nAnswer: 2 {1+1?}"
    assert TextFormat(("text",), "{a!r:>5}|").render({"a": "x"}) == "  'x'|"
    assert TextFormat(template="{q}").render({"q": "{a} {{"}) == "{a} {{", "braces of the data are text"


ALIKE = [
    [(("text",), None), (("x",), "{text}"), (("x",), "{text!s:s}"), (("text", "text"), None)],
    [(("b", "a"), None), ((), "{b}\n{a}"), ((), "{b!s}\n{a:}")],
    [((), "{a}\n{b}")],
    [((), "{a}{{{b}}}|{a}")],
    [((), "{a}{{{b}}}|{a}.")],
    [((), "{a!r}")],
    [((), "{a:>5}"), ((), "{a!s:>5}")],
]


def test_formats_mean_the_same_where_all_texts_are_the_same():
    record = {"text": "春", "a": "x'", "b": "y", "x": "z"}
    groups = [[TextFormat(*one) for one in group] for group in ALIKE]
    for group in groups:
        assert len({text.meaning for text in group}) == len({text.render(record) for text in group}) == 1
    assert len({group[0].meaning for group in groups}) == len({group[0].render(record) for group in groups}) == 7


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", r"data\.template 'no field' must name fields as \{field\}$"),
        ("", r"data\.template '' must name fields as \{field\}$"),
        ("{{a}}", r"must name fields as \{field\}$"),
        ("{0}", r"as \{field\}, \{0\} is not a field name; write \{\{ and \}\} for literal braces"),
        ("{a} {a.b}", r"\{a\.b\} is not a field name"),
        ("{a[0]}", r"\{a\[0\]\} is not a field name"),
        ("{}", r"\{\} is not a field name"),
        ("{", r"data\.template '\{': .*; write \{\{ and \}\} for literal braces"),
        ("{a} }", r"data\.template '\{a\} \}': .*; write \{\{ and \}\} for literal braces"),
    ],
)
def test_a_template_that_names_no_field_is_refused(template, message):
    with pytest.raises(DataError, match=message):
        _ = TextFormat(template=template).columns
    with pytest.raises(DataError, match=message):
        TextFormat(template=template).render({"a": "x"})


@pytest.mark.parametrize("text", [TextFormat(("b", "a")), TextFormat(template="{b} {a}")])
def test_a_field_that_is_missing_or_no_string_is_named(text):
    for record, message in (
        ({"b": "y", "A": "x", "c": "z"}, "no field 'a'; the fields here are: b, A, c; name one of these"),
        ({}, "no field 'b'; the fields here are: none; name one of these"),
        ({"b": "y", "a": 5}, "field 'a' must be a string, it is int"),
        ({"b": None, "a": "x"}, "field 'b' must be a string, it is NoneType"),
        ({"b": ["y"], "a": "x"}, "field 'b' must be a string, it is list"),
    ):
        with pytest.raises(BadRecordError, match=message):
            text.render(record)
        with pytest.raises(BadRecordError, match=message):
            text.values(record)


def test_names_of_a_record_stay_one_short_line():
    for record in ({"x\n\x1b[2J": 1}, {"x" * 10**6: 1}, {str(i): 1 for i in range(10**4)}):
        with pytest.raises(BadRecordError, match="no field 'text'; the fields here are: ") as caught:
            TextFormat().values(record)
        assert is_one_line(caught.value)


@pytest.mark.parametrize(
    ("text", "character"), [(TextFormat(("a", "b")), 6), (TextFormat(template="{a}{b}"), 5), (TextFormat(("b",)), 3)]
)
def test_half_of_a_surrogate_pair_is_named_with_its_place_in_the_text(text, character):
    with pytest.raises(BadRecordError, match=f"half of a surrogate pair at character {character} of the text"):
        text.render({"a": "x春", "b": "yz\ud800\udc00"})
    assert TextFormat().render({"text": "𠮷\U00010000"}) == "𠮷\U00010000"


def open_file(path, cache):
    return open_lines(path, cache, ("text",))


def test_a_record_is_read_from_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a", "b": "1"}\n\n{"text": "b", "b": "2"}')
    source = open_file(path, tmp_path / "cache")
    assert [read_text(source, row, TextFormat(("b", "text"))) for row in (1, 0)] == ["2\nb", "1\na"]


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_its_place(tmp_path, case):
    line, message = BAD_LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    source = open_file(path, tmp_path / "cache")
    assert read_text(source, 0, TextFormat()) == "a"
    with pytest.raises(
        DataError, match=message + r".*; mend the line or leave such lines out with data\.on_error=skip"
    ):
        read_text(source, 1, TextFormat())


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.parquet"
    write_records(path, [{"text": "a"}, {"text": None}])
    source = open_file(path, tmp_path / "cache")
    with pytest.raises(DataError, match=r"a\.parquet row 2: field 'text' must be a string, it is NoneType; mend"):
        read_text(source, 1, TextFormat())


def test_a_template_at_fault_is_not_blamed_on_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": "a"}]))
    with pytest.raises(DataError, match=r"^data\.template '\{0\}'") as caught:
        read_text(open_file(path, tmp_path / "cache"), 0, TextFormat(template="{0}"))
    assert "on_error" not in str(caught.value)


@pytest.mark.parametrize("template", ["{a:d}", "{a!x}", "{a:{b}}", "{a:q}"])
def test_a_template_that_texts_cannot_fill_in_is_refused(template):
    with pytest.raises(
        DataError, match=r"data\.template .* cannot be filled in with texts .* name fields as \{field\}"
    ):
        _ = TextFormat(template=template).columns

"""Every fault and every warning of the doctor says what to do, wherever in its source it is made."""

import ast
from pathlib import Path

import pytest

from stellarbyte_jax.launch import doctor

FILES = sorted(Path(doctor.__file__).parent.glob("*.py"))
FIELDS = ("level", "check", "what", "mend", "facts")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def findings(tree):
    """Calls of Finding, each with the function that makes it."""
    for function in ast.walk(tree):
        if isinstance(function, Function):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Finding":
                    yield function, call


def argument(call, field):
    named = {each.arg: each.value for each in call.keywords}
    given = dict(zip(FIELDS, call.args, strict=False)) | named
    return given.get(field)


def assigned(function, line, *names):
    """What a function assigns to these names down to a line, by statement; None where it leaves one as it is."""
    for statement in ast.walk(function):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value and statement.lineno <= line:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            pairs = [(target, statement.value)]
            if isinstance(target, ast.Tuple):
                whole = isinstance(statement.value, ast.Tuple)
                values = statement.value.elts if whole else [statement.value] * len(target.elts)
                pairs = list(zip(target.elts, values, strict=True))
            found = {each.id: value for each, value in pairs if isinstance(each, ast.Name)}
            if found.keys() & set(names):
                yield tuple(found.get(name) for name in names)


def is_empty(value):
    return value is None or (isinstance(value, ast.Constant) and not value.value)


def is_ok(level):
    return isinstance(level, ast.Constant) and level.value == "ok"


def has_mend(function, call):
    """Whether what is not ok has a mend that is not empty."""
    return _has(function, call.lineno, argument(call, "level"), argument(call, "mend"), ())


def _has(function, line, level, mend, seen):
    if is_ok(level):
        return True
    if isinstance(level, ast.Name):  # one that is not ok is assigned together with its mend
        both = [pair for pair in assigned(function, line, level.id, mend.id) if pair[0] is not None]
        return any(not is_ok(of) for of, _ in both) and all(_has(function, line, *pair, seen) for pair in both)
    if isinstance(mend, ast.Name):
        if mend.id in seen:  # it goes into itself
            return True
        values = [value for (value,) in assigned(function, line, mend.id)]
        loops = [each.target for each in ast.walk(function) if isinstance(each, ast.For)]
        of_loop = any(isinstance(x, ast.Name) and x.id == mend.id for each in loops for x in ast.walk(each))
        return (bool(values) or of_loop) and all(_has(function, line, level, v, (*seen, mend.id)) for v in values)
    if isinstance(mend, ast.IfExp):
        same = isinstance(level, ast.IfExp) and ast.dump(level.test) == ast.dump(mend.test)
        levels = (level.body, level.orelse) if isinstance(level, ast.IfExp) and same else (level, level)
        ways = zip(levels, (mend.body, mend.orelse), strict=True)
        return all(_has(function, line, *way, seen) for way in ways)
    return not is_empty(mend)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_not_ok_has_a_mend(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lacking = [call.lineno for function, call in findings(tree) if not has_mend(function, call)]
    assert not lacking, f"{file.name}: findings on these lines may be no ok, and have no mend"


@pytest.mark.parametrize(
    ("lacks", "text"),
    [
        (True, 'yield Finding("fault", "x", "broken")'),
        (True, 'yield Finding("warning", "x", "broken", facts={})'),
        (True, 'yield Finding("fault", "x", "broken", mend="")'),
        (True, 'mend = "" if fits else "do"; yield Finding("fault", "x", "broken", mend)'),
        (True, 'mend = "do" if fits else ""; yield Finding("ok" if fits else "fault", "x", "broken", mend)'),
        (False, 'mend = "" if fits else "do"; yield Finding("ok" if fits else "fault", "x", "broken", mend)'),
        (True, 'level, mend = "ok", ""; level = "fault"; yield Finding(level, "x", "broken", mend)'),
        (False, 'level, mend = "ok", ""; level, mend = "fault", "do"; yield Finding(level, "x", "broken", mend)'),
        (False, 'yield Finding("ok", "x", "fine")'),
    ],
)
def test_the_reader_of_the_source_sees_what_is_missing(lacks, text):
    tree = ast.parse(f"def check(fits):\n    {text}")
    ((function, call),) = findings(tree)
    assert has_mend(function, call) != lacks


def test_findings_are_made_in_many_places():
    counts = [sum(1 for _ in findings(ast.parse(file.read_text(encoding="utf-8")))) for file in FILES]
    text = "".join(file.read_text(encoding="utf-8") for file in FILES)
    assert sum(counts) == text.count("Finding(") > 50

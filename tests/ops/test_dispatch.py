"""The choice of an implementation by its name."""

import logging

import pytest

from stellarbyte_jax.ops import dispatch as module
from stellarbyte_jax.ops.dispatch import dispatch


def refuses(x):
    raise NotImplementedError(f"the number {x}")


TWO = {"narrow": refuses, "wide": lambda x: 2 * x, "last": lambda x: 3 * x}


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch, caplog):
    monkeypatch.setattr(module, "_logged", set())
    caplog.set_level(logging.INFO)


def test_auto_takes_the_first_that_does_not_refuse_and_says_so_once(caplog):
    assert [dispatch("doubling", "auto", TWO, 4) for _ in range(3)] == [8] * 3
    assert caplog.messages == ["doubling: using wide (narrow refused: the number 4)"]


def test_a_named_one_is_taken_or_refuses_loudly(caplog):
    assert dispatch("doubling", "last", TWO, 4) == 12
    with pytest.raises(NotImplementedError, match=r"^doubling: narrow refused: the number 4$"):
        dispatch("doubling", "narrow", TWO, 4)
    assert caplog.messages == []


def test_a_named_one_that_is_not_required_comes_first_and_may_step_aside(caplog):
    assert dispatch("doubling", "last", TWO, 4, required=False) == 12
    assert [dispatch("doubling", "narrow", TWO, 4, required=False) for _ in range(2)] == [8, 8]
    assert caplog.messages == ["doubling: using last", "doubling: using wide (narrow refused: the number 4)"]


def test_where_all_refuse_each_reason_is_told():
    with pytest.raises(NotImplementedError, match=r"^doubling: a refused: the number 1; b refused: the number 1$"):
        dispatch("doubling", "auto", {"a": refuses, "b": refuses}, 1)


@pytest.mark.parametrize("required", [True, False])
def test_an_unknown_name_lists_what_exists(required):
    with pytest.raises(ValueError, match="doubling: no implementation 'wid'; there are auto, narrow, wide, last"):
        dispatch("doubling", "wid", TWO, 4, required=required)

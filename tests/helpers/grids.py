"""Grids of tests of which a part runs every time."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters of a test: those named run in every run of the tests, the others in that of slow ones."""
    cases = list(cases)
    unknown = [case for case in always if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [pytest.param(case, marks=() if case in always else pytest.mark.slow) for case in cases]

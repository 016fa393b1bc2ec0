"""Grids of tests of which a part runs every time; ``REPEATS`` marks a case of the rest."""

from collections.abc import Iterable
from typing import Any

import pytest

REPEATS = (pytest.mark.slow, pytest.mark.repeats)


def mostly_slow(cases: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters of a test: those named run always, the others, which repeat them, in ``make test-slow`` alone."""
    cases = list(cases)
    unknown = [case for case in always if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [pytest.param(case, marks=() if case in always else REPEATS) for case in cases]

"""How much a run takes of a cross product, and of a property: a sample by default, all of it in the slow suite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings


def sample(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """The cases for `parametrize`, of which those that are not in `quick` are slow.

    Args:
        cases: all of them; a tuple holds several arguments.
        quick: those that cover every kind of check.
    """
    quick, cases = list(quick), list(cases)
    assert quick and all(case in cases for case in quick), "a case that there is not"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]


def examples(count: int, **options: Any) -> settings:
    """So many examples in the slow suite, by default less than a third: see `conftest.py`."""
    return settings(deadline=None, max_examples=max(count * settings().max_examples // 100, 5), **options)

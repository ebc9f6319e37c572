"""Reduce repetitions: `make test` runs part of the cases, `make test-all` all of them."""

from __future__ import annotations

from typing import Any

import pytest

FEWER = 1  # set by conftest.py before tests are imported


def others(*cases: Any) -> list[Any]:
    """Mark cases of a parametrised test as thorough."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough) for case in cases]


def examples(count: int) -> int:
    """Return how many examples a costly test draws: all, or fewer without thorough tests."""
    return max(1, count // FEWER)

"""Repetitions: which cases and how many of them `make test` leaves to `make test-all`."""

from __future__ import annotations

from typing import Any

import pytest

FEWER = 1  # conftest.py sets it, before tests are imported


def others(*cases: Any) -> list[Any]:
    """Mark cases of a parametrised test as thorough: values, or tuples of several."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough) for case in cases]


def examples(count: int) -> int:
    """Return how many examples a costly test draws: all, or fewer where thorough tests are left out."""
    return max(1, count // FEWER)

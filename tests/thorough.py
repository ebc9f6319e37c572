"""Cases of a test that repeat what another case has shown."""

from __future__ import annotations

from typing import Any

import pytest


def others(*cases: Any) -> list[Any]:
    """Mark cases of a parametrised test as thorough: values, or tuples of several."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough) for case in cases]

"""IIMM factors against the formula in exact fractions, with shrink and clip; importance files."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm import ArgumentError, importance_factors
from mergekit_imm.options.layer_factors import Importance, read_importance

VALUES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)
ENDS = st.tuples(st.floats(0, 3), st.floats(0, 3)).map(sorted).map(tuple)


@given(values=VALUES, shrink=st.floats(0, 1), clip=st.none() | ENDS)
def test_factors_are_the_formula(values: list[float], shrink: float, clip: tuple[float, float] | None) -> None:
    exact = [Fraction(value) for value in values]
    expected = []
    for value in exact:
        factor = 1 + Fraction(shrink) * (len(exact) * value / sum(exact) - 1)
        expected.append(factor if clip is None else min(max(factor, Fraction(clip[0])), Fraction(clip[1])))
    found = importance_factors({f"h.{n}": value for n, value in enumerate(values)}, shrink=shrink, clip=clip)
    assert list(found.values()) == pytest.approx([float(factor) for factor in expected], rel=1e-12, abs=1e-12)
    if clip is None:
        assert sum(found.values()) == pytest.approx(len(values))


def test_extreme_shrink_and_clip() -> None:
    importance = {"h.0": 1.0, "h.1": 2.0, "h.2": 5.0}
    assert importance_factors(importance, shrink=1.0) == importance_factors(importance)
    assert set(importance_factors(importance, shrink=0.0).values()) == {1.0}
    assert importance_factors(importance, clip=(0.5, 1.0)) == {"h.0": 0.5, "h.1": 0.75, "h.2": 1.0}
    assert importance_factors(importance, shrink=0.5, clip=(0.0, 1.0))["h.0"] == 0.6875  # shrunk first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": 1.5}, "shrink is 1.5; it must be a number from 0 to 1"),
        ({"shrink": -0.1}, "shrink is -0.1"),
        ({"shrink": float("nan")}, "shrink is nan"),
        ({"shrink": True}, "shrink is True"),
        ({"clip": (2.0, 1.0)}, "clip is (2.0, 1.0); it must be (low, high)"),
        ({"clip": (-1.0, 1.0)}, "clip is (-1.0, 1.0)"),
        ({"clip": (0.0, float("inf"))}, "clip is (0.0, inf)"),
        ({"clip": (0.0,)}, "clip is (0.0,)"),
        ({"clip": 2.0}, "clip is 2.0"),
        ({"clip": ("0", "1")}, "clip is ('0', '1')"),
    ],
)
def test_invalid_shrink_and_clip_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        importance_factors({"h.0": 1.0}, **options)


def test_a_file_of_what_was_measured_is_read_back(tmp_path: Path) -> None:
    found = Importance({"h.0": 1.0, "h.1": 0.1}, {"head": 2.0}, {"h.*.w": {"h.0": 1.0}}, ("v",), "first", 3, 70, 2.5)
    (tmp_path / "i.json").write_text(json.dumps(found.to_dict()))
    assert read_importance(tmp_path / "i.json") == found.layers

"""Recipes, reports and indexes are the JSON that Python's own encoder writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm.common.json_files import indented

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@given(VALUES)
def test_as_python_indents(value: Any) -> None:
    assert "".join(indented(value)) == json.dumps(value, indent=2, ensure_ascii=False)


def test_long_values_in_pieces() -> None:
    value = {"numbers": list(range(25_000)), "names": {f"n{i}": "é" for i in range(10_000)}}
    pieces = list(indented(value))
    assert "".join(pieces) == json.dumps(value, indent=2, ensure_ascii=False)
    assert max(map(len, pieces)) < 300_000


def test_pairs_stand_for_a_mapping() -> None:
    pairs = ((name, {"n": n}) for n, name in enumerate("ab"))
    none = (pair for pair in list[tuple[str, int]]())
    expected = {"all": {"a": {"n": 0}, "b": {"n": 1}}, "none": {}}
    assert "".join(indented({"all": pairs, "none": none})) == json.dumps(expected, indent=2)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": {"b": -float("inf")}}])
def test_what_json_has_no_number_for(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        "".join(indented(value))

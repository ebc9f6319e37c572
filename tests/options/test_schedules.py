"""Schedules: one value per round."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm import ArgumentError
from mergekit_imm.schedules import cosine, linear, parse_schedule


@given(first=st.floats(0, 1), last=st.floats(0, 1), rounds=st.integers(1, 30))
def test_schedules_begin_and_end_where_they_say(first: float, last: float, rounds: int) -> None:
    for make in (linear, cosine):
        schedule = make(first, last, rounds)
        values = [schedule(t) for t in range(rounds)]
        assert values[0] == first
        assert rounds == 1 or values[-1] == last
        assert schedule(rounds + 5) == last
        ordered = sorted(values, reverse=last < first)
        assert values == pytest.approx(ordered, abs=1e-12)


def test_parse_schedule() -> None:
    assert [parse_schedule("0.1,0.2,0.3", 3)(t) for t in range(3)] == [0.1, 0.2, 0.3]
    assert parse_schedule("0.5", 9)(8) == 0.5
    assert parse_schedule("cosine:0,1", 5)(1) == pytest.approx((1 - 2**-0.5) / 2)
    with pytest.raises(ArgumentError, match=re.escape("there are 3 values and none for round 3")):
        parse_schedule("0.1,0.2,0.3", 3)(3)

"""Which alpha to measure next, and which is best: against a walk over the whole grid."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm import ArgumentError
from mergekit_imm.loop.choice import AUTO, Choice, best_of, dip_in, next_alphas, parse_choice

AUTOMATIC = Choice(AUTO, is_search=True)


def searched(choice: Choice, values: dict[float, float]) -> dict[float, float]:
    """Measure what is asked for, until nothing is."""
    seen: dict[float, float] = {}
    while asked := next_alphas(choice, seen):
        assert not set(asked) & set(seen), "nothing is measured twice"
        assert len(asked) == (1 if seen else min(2, len(choice.alphas)))
        seen |= {alpha: values[alpha] for alpha in asked}
    return seen


@st.composite
def one_peak(draw: st.DrawFn) -> dict[float, float]:
    """A metric over the grid that rises strictly to some alpha, and falls strictly from there."""
    steps = draw(st.lists(st.integers(1, 100), min_size=11, max_size=11))
    peak = draw(st.integers(0, 10))
    heights = [0] * 11
    for place in (*range(peak - 1, -1, -1), *range(peak + 1, 11)):
        heights[place] = heights[place + (1 if place < peak else -1)] - steps[place]
    return dict(zip(AUTO, map(float, heights), strict=True))


@given(one_peak())
def test_a_search_finds_the_peak_in_five(values: dict[float, float]) -> None:
    seen = searched(AUTOMATIC, values)
    assert best_of(seen) == max(values, key=lambda alpha: values[alpha])
    assert len(seen) in (4, 5)
    assert dip_in(seen) is None


@given(st.lists(st.integers(0, 5), min_size=11, max_size=11))
def test_a_search_of_anything_ends_with_the_best_that_it_saw(heights: list[int]) -> None:
    """Only two models are kept: the best so far, and the one to compare it with."""
    values = dict(zip(AUTO, map(float, heights), strict=True))
    seen: dict[float, float] = {}
    kept: set[float] = set()
    while asked := next_alphas(AUTOMATIC, seen):
        assert len(kept | set(asked)) <= AUTOMATIC.at_once
        seen |= {alpha: values[alpha] for alpha in asked}
        kept = {best_of(seen)}
    assert len(seen) <= 5
    most = max(seen.values())
    assert kept == {max(alpha for alpha in seen if seen[alpha] == most)}
    if dip_in(seen):
        assert any(values[b] < min(values[a], values[c]) for a, b, c in itertools.combinations(AUTO, 3)), (
            "a dip that was seen is one"
        )


@given(st.dictionaries(st.sampled_from(AUTO), st.integers(0, 9).map(float)))
def test_a_dip_is_the_deepest(seen: dict[float, float]) -> None:
    depths = {
        three: min(seen[three[0]], seen[three[2]]) - seen[three[1]] for three in itertools.combinations(sorted(seen), 3)
    }
    found = dip_in(seen)
    deepest = max(depths.values(), default=0.0)
    assert (found is None) == (deepest <= 0)
    if found is not None:
        assert depths[found] == deepest


def test_a_list_is_measured_whole() -> None:
    choice = parse_choice("choose:0.8,0.2,5e-1")
    assert choice == Choice((0.2, 0.5, 0.8))
    assert next_alphas(choice, {}) == (0.2, 0.5, 0.8)
    assert next_alphas(choice, {0.5: 1.0}) == (0.2, 0.8)
    assert next_alphas(choice, {0.5: 1.0, 0.2: 1.0, 0.8: 0.0}) == ()
    assert best_of({0.5: 1.0, 0.2: 1.0, 0.8: 0.0}) == 0.5
    assert parse_choice("linear:0.2,0.8") is None


@pytest.mark.parametrize("text", ["choose:", "choose:0.5", "choose:0.5,0.50", "choose:0.2,x", "choose:Auto"])
def test_what_leaves_no_choice_is_refused(text: str) -> None:
    with pytest.raises(
        ArgumentError, match=r"write two or more different alphas, choose:0.2,0.4,0.6,0.8, or choose:auto"
    ):
        parse_choice(text)


@pytest.mark.parametrize("text", ["choose:0.5,2", "choose:nan,0.5", "choose:-0.1,0.5"])
def test_an_alpha_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="a number in 0 <= alpha <= 1"):
        parse_choice(text)
